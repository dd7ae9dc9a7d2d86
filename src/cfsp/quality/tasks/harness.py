"""Running tasks through lm-evaluation-harness on a model that is already loaded.

Requests, scoring and standard errors are all the harness's own; here is only the wiring.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.text_config import longest_input_of
from cfsp.engine.decoder_end import text_model
from cfsp.errors import CfspError, MissingExtraError, TaskError
from cfsp.quality.tasks.selection import TaskSelection, check_known, jsonl_task_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")
# That of the harness's own command.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskRunner:
    """The harness with its index of tasks, ready to score one model after the other.

    Attributes:
        selection: which tasks, and how.
        manager: the harness's `TaskManager`.
    """

    selection: TaskSelection
    manager: Any

    @classmethod
    def of(cls, selection: TaskSelection) -> TaskRunner:
        """Index the tasks and check that all those selected exist, before any model is loaded.

        Raises:
            TaskError: a task is unknown.
            MissingExtraError: the harness is not installed.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError("scoring tasks", "eval") from error
        offline = selection.data is not None
        with _quiet():
            manager = TaskManager(
                include_path=jsonl_task_directory() if offline else None,
                include_defaults=not offline,
                metadata={"directory": str(selection.data)} if offline else None,
            )
        where = "--task-data" if offline else "lm-evaluation-harness"
        check_known(selection.task_names, manager.all_tasks, where)
        return cls(selection, manager)

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Score a model.

        Returns:
            Task or group -> {version, shots, documents, and each metric with its standard
            error}.

        Raises:
            TaskError: the harness cannot get a task's data.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            loaded = {name: self._load(name) for name in self.selection.task_names}
            everything = self.manager.load(
                [item for tasks in loaded.values() for item in tasks.roots]
            )
            for task in everything["tasks"].values():
                self._set_shots(task)
            # Not simple_evaluate: it also asks git and every package for versions, for reports
            # of its own, and git complains where there is no repository.
            results = evaluate(
                lm=HFLM(
                    pretrained=text_model(model),
                    tokenizer=tokenizer,
                    batch_size=self.selection.batch,
                    # It does not look for it in the text config of a multimodal one.
                    max_length=longest_input_of(model.config),
                ),
                task_dict=everything,
                limit=self.selection.limit,
                log_samples=False,
            )
        return {
            entry: _scores(entry, members, results)
            for name, tasks in loaded.items()
            for entry, members in tasks.entries(name, results["results"])
        }

    def read_data(self) -> None:
        """Read the data of every task once, before any model is loaded.

        Raises:
            TaskError: the harness cannot get it.
        """
        with _quiet():
            for name in self.selection.task_names:
                self._load(name)

    def conditions(self) -> dict[str, Any]:
        """Return what holds for all tasks, as JSON types."""
        from importlib.metadata import version

        return {
            "harness": f"lm-evaluation-harness {version('lm_eval')}",
            "limit": self.selection.limit,
            "shots": self.selection.shots,
            "batch": self.selection.batch,
            "task_data": "JSONL files" if self.selection.data else "the harness's own",
        }

    def _set_shots(self, task: Any) -> None:
        """Set the solved examples before each question, as the harness's own command does."""
        of_task = task.get_config("num_fewshot")
        if of_task is None or (self.selection.shots is not None and of_task != 0):
            task.set_config(key="num_fewshot", value=self.selection.shots or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    def _load(self, name: str) -> _LoadedTasks:
        """Load one name's data anew: the harness keeps a run's requests in its task objects."""
        try:
            loaded = self.manager.load([name])
        except CfspError:
            raise
        except Exception as error:  # network, hub and data set errors of many types
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise TaskError(
                f"the harness cannot get the data of {name} now ({type(error).__name__}: "
                f"{reason}); check the network, or give local files with --task-data"
            ) from error
        groups, tasks = loaded["groups"], loaded["tasks"]
        roots = [groups[name]] if name in groups else list(tasks.values())
        return _LoadedTasks(roots, list(tasks))


@dataclass(frozen=True)
class _LoadedTasks:
    """What one name stands for: a task, a group of tasks with a mean, or a tag.

    Attributes:
        roots: the harness's objects to run.
        leaves: names of all single tasks.
    """

    roots: list[Any]
    leaves: list[str]

    def entries(self, name: str, measured: dict[str, Any]) -> list[tuple[str, list[str]]]:
        """Return what to report, each with its single tasks: the mean where there is one."""
        if f"{METRICS[0]},none" in measured.get(name, {}):
            return [(name, self.leaves)]
        return [(leaf, [leaf]) for leaf in self.leaves]


def _scores(name: str, members: list[str], results: dict[str, Any]) -> dict[str, Any]:
    measured = results["results"][name]
    scores: dict[str, Any] = {
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(members[0]),
        "documents": sum(results["n-samples"][task]["effective"] for task in members),
    }
    for metric in METRICS:
        if f"{metric},none" in measured:
            error = measured.get(f"{metric}_stderr,none")
            scores[metric] = float(measured[f"{metric},none"])
            # Of a single document there is none: the harness says "N/A".
            scores[f"{metric}_stderr"] = float(error) if isinstance(error, float) else None
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output free for results, and progress off what is not a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    progress = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stdout(sys.stderr), redirect_stderr(progress):
            yield
    finally:
        logger.setLevel(level)
