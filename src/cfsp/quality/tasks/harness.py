"""Running tasks through lm-evaluation-harness on a model that is already loaded.

Requests, scoring and standard errors are all the harness's own; here is only the wiring, and what
a model made of each document, so that models are compared in pairs.

There are three kinds of documents: choices to pick from, a text to continue (as LAMBADA's last
word), and an answer to write (as GSM8K's). A scored document has of these fields what applies:

    id              number in its task, after the task's name where a group has several
    hash            of its content, so that only the same ones are compared
    acc             1 if it is right (the likeliest choice, every token of the continuation, or the
                    answer), else 0; or what the task itself says, as TruthfulQA the probability of
                    all true answers
    chance          probability that a guess is right; None where the task says what acc is
    gold            number of the right choice, or of several
    loglikelihoods  of each choice, or of the one continuation, in nats
    choice          number of the likeliest choice
    choice_norm     number of the likeliest choice by character
    answer          what was written
    acc_norm        1 if the likeliest choice by character is right, else 0
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.checkpoint.text_config import longest_input_of
from cfsp.errors import CfspError, MissingExtraError, TaskError, first_line
from cfsp.quality.generation import Whole
from cfsp.quality.paired import mean
from cfsp.quality.tasks.messages import quiet, telling_what_is_too_long
from cfsp.quality.tasks.selection import (
    DEFAULT_FORM,
    JSONL_TASKS,
    TaskSelection,
    check_known,
    read_documents,
)
from cfsp.streaming.decoder_end import text_model
from cfsp.streaming.runtime import check_is_number
from cfsp.streaming.work_dir import WorkDir, load_or_compute

logger = logging.getLogger(__name__)

HARNESS_METRICS = ("acc", "acc_norm", "exact_match")
# How the harness takes an answer from what was written; the first that a task has is taken.
FILTERS = ("none", "strict-match", "flexible-extract")
UNREAD = "[invalid]"  # what they give where they find no answer

ScoredDocument = dict[str, Any]
_FEWSHOT_SEED = 1234  # that of the harness's own command
_FEWEST_DRAWS = 2  # with none it computes no standard error at all


@dataclass(frozen=True)
class TaskRunner:
    """The harness with its index of tasks, ready to score one model after the other."""

    selection: TaskSelection
    manager: Any  # the harness's `TaskManager`

    @classmethod
    def of(cls, selection: TaskSelection) -> TaskRunner:
        """Index the tasks and check that all those selected exist, before any model is loaded."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError("scoring tasks", "eval") from error
        offline = selection.data is not None
        with quiet():
            manager = TaskManager(
                include_path=JSONL_TASKS if offline else None,
                include_defaults=not offline,
                metadata={"directory": str(selection.data)} if offline else None,
            )
        where = "--task-data" if offline else "lm-evaluation-harness"
        check_known(selection.task_names, manager.all_tasks, where)
        selection.check_source()
        return cls(selection, manager)

    def scores_of(self, whole: Whole, name: str, work_dir: WorkDir) -> dict[str, Any]:
        """Return the `tasks` and `documents` of a model, which is loaded if any are missing."""
        scorer = cache(lambda: self.scorer(*whole()))

        def score(task: str) -> dict[str, Any]:
            return scorer()(task)

        found: dict[str, Any] = {"tasks": {}, "documents": {}}
        for position, task in enumerate(self.selection.task_names):
            scored = load_or_compute(work_dir, f"{name}-{position}", partial(score, task))
            for key in found:
                found[key].update(scored[key])
        return found

    def scorer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[str], dict[str, Any]]:
        """Return what scores a model on tasks by name; see `score`."""
        from lm_eval.models.huggingface import HFLM

        with quiet():
            lm = HFLM(
                pretrained=text_model(model),
                tokenizer=tokenizer,
                batch_size=self.selection.batch,
                # A bfloat16 log-likelihood of -100 has steps of 0.5: choices would be equal.
                softmax_dtype="float32",
                # It does not look for it in the text config of a multimodal one.
                max_length=longest_input_of(model.config),
            )

        def score(name: str) -> dict[str, Any]:
            with telling_what_is_too_long(name, lm.max_length):
                return self.score(lm, model.dtype, name)

        return score

    def read_data(self) -> None:
        """Read the data of every task once, and check them, before any model is loaded."""
        for name in self.selection.task_names:
            with quiet():
                tasks = self.load(name)["tasks"]
                if self.selection.shots:
                    self._check_shots(name, tasks)
            _check_has_scores(name, tasks)

    def conditions(self) -> dict[str, Any]:
        """Return what holds for all tasks, as JSON types."""
        return {
            "harness": f"lm-evaluation-harness {version('lm_eval')}",
            "limit": self.selection.limit,
            "shots": self.selection.shots,
            "batch": self.selection.batch,
            "softmax": "float32",
            "task_data": "JSONL files" if self.selection.data else "the harness's own",
        }

    def identity(self) -> dict[str, Any]:
        """Return what scores depend on, as JSON types."""
        names, data = list(self.selection.names), self.selection.data
        digest = sha256()
        for name in self.selection.task_names if data is not None else ():
            of_task = self.manager.task_index[name].cfg["metadata"]
            documents = read_documents(data / of_task["file"], of_task.get("form", DEFAULT_FORM))
            digest.update(json.dumps(documents).encode())
        return {**self.conditions(), "names": names, "data": data and digest.hexdigest()}

    def set_shots(self, task: Any) -> None:
        """Set the solved examples before each question, as the harness's own command does."""
        of_task = task.get_config("num_fewshot")
        if of_task is None or (self.selection.shots is not None and of_task != 0):
            task.set_config(key="num_fewshot", value=self.selection.shots or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    def _check_shots(self, asked: str, tasks: Mapping[str, Any]) -> None:
        """Check that there are solved examples enough, by the first question of each task."""
        if none := sum(task.get_config("num_fewshot") == 0 for task in tasks.values()):
            told = "%s: %d of its tasks take no solved examples, whatever --shots says"
            logger.warning(told, asked, none)
        for name, task in tasks.items():
            self.set_shots(task)
            try:
                task.build_all_requests(limit=1)
            except (ValueError, AssertionError) as error:  # by the way that it samples them
                raise TaskError(
                    f"{name} has no {self.selection.shots} solved examples to put before a "
                    f"question ({first_line(error)}); give fewer --shots"
                ) from error

    def load(self, name: str) -> dict[str, Any]:
        """Load one name's data anew: the harness keeps a run's requests in its task objects.

        Returns what the harness runs: single `tasks` by name, and their `groups`.
        """
        try:
            loaded: dict[str, Any] = self.manager.load([name])
        except CfspError:
            raise
        except Exception as error:  # network, hub and data set errors of many types
            raise TaskError(
                f"the harness cannot get the data of {name} now ({first_line(error)}); "
                "check the network, or give local files with --task-data"
            ) from error
        return loaded

    def score(self, lm: Any, dtype: torch.dtype, name: str) -> dict[str, Any]:
        """Score a model, as the harness runs it, in a dtype on one task, or on all of a group.

        Returns:
            `tasks`: task or group -> {version, shots, documents, chance, and each metric with its
            standard error}. `documents`: task or group -> its documents.
        """
        from lm_eval import evaluate

        # The harness would fork for its bootstrap: a fork of many threads can hang for ever.
        os.environ["DISABLE_MULTIPROC"] = "1"
        with quiet():
            loaded = self.load(name)
            leaves = loaded["tasks"]
            for task in leaves.values():
                self.set_shots(task)
            # Not simple_evaluate: it also asks git and every package for versions, for reports
            # of its own, and git complains where there is no repository.
            results = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=self.selection.limit,
                log_samples=True,
                # Errors that nothing here reports, such as that of a perplexity, are by bootstrap.
                bootstrap_iters=_FEWEST_DRAWS,
            )
        logged = {each: (task, results["samples"][each]) for each, task in leaves.items()}
        entries = [(name, [*leaves], scored_documents([*logged.values()]))]
        if not _is_their_mean(results["results"].get(name, {}), entries[0][2]):
            entries = [(each, [each], scored_documents([of])) for each, of in logged.items()]
        scores, documents = {}, {}
        for entry, members, scored in entries:
            measured = _scores(entry, members, results)
            # What a group does not give in the mean, its pairs do not compare.
            left_out = {"acc_norm"} - measured.keys()
            documents[entry] = [
                {key: value for key, value in each.items() if key not in left_out}
                for each in scored
            ]
            # NaN would be taken for the likeliest.
            found = (each.get("loglikelihoods", ()) for each in documents[entry])
            check_is_number(sum(map(sum, found)), entry, dtype)
            scores[entry] = measured | summary_of(documents[entry])
        return {"tasks": scores, "documents": documents}


def _is_their_mean(measured: Mapping[str, Any], documents: Sequence[ScoredDocument]) -> bool:
    """Return whether the accuracy of a group is its documents': only then pairs are of it."""
    found = measured.get(f"{HARNESS_METRICS[0]},none", math.nan)
    values = [each["acc"] for each in documents]
    return bool(values) and math.isclose(mean(values).value, found, abs_tol=1e-9)


def _check_has_scores(name: str, tasks: Mapping[str, Any]) -> None:
    """Check that a task ends with a number that is read here; of a group, say which do not.

    Choices have none by F1 or MCC, but two models are compared in which of them are right.
    """
    unread, in_pairs = [], False
    for leaf, task in tasks.items():
        metrics = [*task.aggregation()]
        taken = sorted({each["name"] for each in task.config.filter_list or ()} or {"none"})
        is_read = not {*taken}.isdisjoint(FILTERS)
        if not (is_read and {*metrics} & {*HARNESS_METRICS}):
            unread.append(f"{leaf} by {', '.join(metrics)} of answers taken by {', '.join(taken)}")
            in_pairs |= is_read and task.OUTPUT_TYPE == "multiple_choice"
    if not unread:
        return
    told = f"expected scores by {' or '.join(HARNESS_METRICS)}, found {'; '.join(unread)}"
    if len(unread) == len(tasks) and not in_pairs:
        raise TaskError(f"{told}; leave {name} out, or score it by lm_eval itself")
    but = ", but choices are compared in pairs of models" if in_pairs else ""
    logger.warning("%s: %s; these get no number%s", name, told, but)


def _scores(name: str, members: list[str], results: dict[str, Any]) -> dict[str, Any]:
    measured = results["results"][name]
    scores: dict[str, Any] = {
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(members[0]),
        "documents": sum(results["n-samples"][task]["effective"] for task in members),
    }
    for metric in HARNESS_METRICS:
        for key in (f"{metric},{each}" for each in FILTERS):
            if key in measured and metric not in scores:
                error = measured.get(key.replace(",", "_stderr,"))
                scores[metric] = float(measured[key])
                # Of a single document there is none: the harness says "N/A".
                scores[f"{metric}_stderr"] = float(error) if isinstance(error, float) else None
    return scores


def scored_documents(tasks: Sequence[tuple[Any, Sequence[dict[str, Any]]]]) -> list[ScoredDocument]:
    """Return the documents of a task, or of all tasks of a group, in their order.

    Each of the harness's tasks comes with what it logged: of each filter a sample of each document.
    """
    found: list[ScoredDocument] = []
    picked: list[list[str]] = []
    for task, logged in tasks:
        filters = {sample["filter"] for sample in logged}
        chosen = next((each for each in FILTERS if each in filters), None)
        for sample in logged:
            if sample["filter"] != chosen:
                continue
            document = {
                "id": f"{task.config.task}/{sample['doc_id']}",
                "hash": sample["doc_hash"][:16],
            }
            if task.OUTPUT_TYPE == "multiple_choice":
                picked.append(task.doc_to_choice(sample["doc"]))
                found.append(document | _multiple_choice(task, sample, picked[-1]))
            elif task.OUTPUT_TYPE == "loglikelihood" and "acc" in sample:
                likelihoods = [round(float(sample["filtered_resps"][0][0]), 5)]
                right = {"acc": float(sample["acc"]), "chance": 0.0}
                found.append(document | right | {"loglikelihoods": likelihoods})
            elif metric := next((each for each in ("exact_match", "acc") if each in sample), None):
                right = {"acc": float(sample[metric]), "chance": 0.0}
                found.append(document | right | {"answer": str(sample["filtered_resps"][0])})
    if len(picked) > 1 and all(choices == picked[0] for choices in picked):
        # To say yes to everything is right in most documents of BoolQ: the best constant guess.
        _, times = Counter(str(each.get("gold")) for each in found).most_common(1)[0]
        return [each | {"chance": each["chance"] and times / len(found)} for each in found]
    return found


def summary_of(documents: Sequence[ScoredDocument]) -> dict[str, Any]:
    """Return the accuracy of a guess, and of continuations the mean loss in nats with its error."""
    if not documents:
        return {}
    chance = chance_of(documents)
    found: dict[str, Any] = {"chance": None if chance is None else round(chance, 6)}
    if (losses := losses_of(documents)) is not None:
        loss = mean(losses)
        found |= {"loss": loss.value, "loss_stderr": loss.stderr}
    return found


def chance_of(documents: Sequence[ScoredDocument]) -> float | None:
    """Return the accuracy of a guess; None where that of any document is not known."""
    chances = [each["chance"] for each in documents]
    return None if None in chances else mean(chances).value


def losses_of(documents: Sequence[ScoredDocument]) -> list[float] | None:
    """Return the loss of each document in nats where all are texts to continue, else None."""
    if any("gold" in each or "loglikelihoods" not in each for each in documents):
        return None
    return [-each["loglikelihoods"][0] for each in documents]


def _multiple_choice(task: Any, sample: dict[str, Any], choices: list[str]) -> ScoredDocument:
    # Of documents with a context for each choice, the harness calls the right one the text.
    gold_of = task.doc_to_text if task.multiple_input else task.doc_to_target
    gold = _gold(gold_of(sample["doc"]), choices)
    golds = gold if isinstance(gold, list) else [gold]
    likelihoods = [float(each[0]) for each in sample["filtered_resps"][: len(choices)]]
    by_character = [
        each / max(1, len(choice)) for each, choice in zip(likelihoods, choices, strict=True)
    ]
    choice = likelihoods.index(max(likelihoods))
    is_right = float(choice in golds)
    # By metrics without an accuracy, such as F1, two models are compared by that of choices.
    accuracy = float(sample.get("acc", is_right))
    found = {
        "acc": accuracy,
        "chance": len(golds) / len(choices) if accuracy == is_right else None,
        "gold": gold,
        "loglikelihoods": [round(each, 5) for each in likelihoods],
        "choice": choice,
        "choice_norm": by_character.index(max(by_character)),
    }
    return found | ({"acc_norm": float(sample["acc_norm"])} if "acc_norm" in sample else {})


def _gold(found: Any, choices: Sequence[str]) -> int | list[int]:
    if isinstance(found, list):
        return [int(each) for each in found]
    return choices.index(found) if isinstance(found, str) else int(found)
