"""Models on the same texts, tasks and questions, beside a dense one; a model before and after."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_is_outside
from cfsp.checkpoint.reading import Checkpoint, WeightSource
from cfsp.checkpoint.text_config import longest_input_of, vocabulary_of
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.quality.answers import Questions, answers_of, answers_result, windows_of
from cfsp.quality.compare import agreement_of
from cfsp.quality.perplexity import DenseEnd, WindowSums, joined_sums, perplexity_of, streamed_sums
from cfsp.quality.results_file import measured_into
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.settings import DEFAULT_SEQLEN, Compute, EvaluationText
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.memory import hidden_budget
from cfsp.streaming.runtime import (
    Runtime,
    check_fits,
    check_is_number,
    check_same_work,
    runtime_of,
    versions,
)
from cfsp.streaming.work_dir import WorkDir, load_or_compute, temporary_work_dir
from cfsp.text.drawing import consecutive_windows
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows, digests_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exam:
    """What models read, computed in what, and what they answer beside, each whole in memory."""

    texts: EvaluationText
    compute: Compute
    tasks: TaskRunner | None = None
    questions: Questions | None = None  # which the dense model answers, too


@dataclass(frozen=True)
class _Model:
    """A model that is measured, its windows and prompts, and what its results begin with."""

    source: Checkpoint
    runtime: Runtime
    windows: Mapping[str, Windows]
    prompts: Sequence[list[int]]
    facts: Mapping[str, Any]

    @staticmethod
    def of(source: Checkpoint, exam: Exam) -> _Model:
        runtime = runtime_of(exam.compute, source)
        facts = {
            "model": source.label,
            "fingerprint": source.fingerprint,
            "parameters": source.parameter_count,
            "dtype": str(runtime.dtype).removeprefix("torch."),
        }
        prompts = []
        if exam.questions is not None:
            prompts = exam.questions.prompts(source, load_tokenizer(source.directory))
        return _Model(source, runtime, evaluation_windows(exam.texts, source), prompts, facts)

    def whole(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load it, with its tokenizer."""
        directory, runtime = self.source.directory, self.runtime
        loaded = load(directory, dtype=runtime.dtype, device=runtime.device)
        return loaded, load_tokenizer(directory)

    def result(self, measured: Mapping[str, WindowSums]) -> dict[str, Any]:
        """Return what was measured on each text, as JSON types."""
        perplexity, windows = {}, {}
        for text, sums in measured.items():
            label = f"{self.source.label} on {text}"
            of_text = self.windows[text]
            perplexity[text] = perplexity_of(sum(sums["loss"]), of_text, label, self.runtime.dtype)
            predicted = of_text.scored_N.tolist()
            windows[text] = {"digest": of_text.digest, "predicted": predicted, **sums}
        return {**self.facts, "perplexity": perplexity, "windows": windows}


@dataclass(frozen=True)
class Dense:
    """The dense model of a sweep: asked once for all that are compared with it later."""

    source: Checkpoint
    result: dict[str, Any]  # what `evaluate_models` gave, asked the same; empty before
    passes: WorkDir  # outlives it, and has what is too large for memory
    # What leaves its last block, by the digest of windows.
    hidden: dict[str, HiddenStates] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """What models are asked, and by whom."""

    exam: Exam
    compares: bool  # the first model is the dense one
    dense: Dense | None
    team: Team

    @property
    def known(self) -> list[dict[str, Any]]:
        """The results of the dense model, if it was measured before."""
        return [self.dense.result] if self.dense is not None and self.dense.result else []


def evaluate_models(
    names: Sequence[str | Path],
    exam: Exam,
    *,
    against: str | Path | Dense | None = None,
    out: Path | None = None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Measure several models on the same texts and tasks, in windows of the same length.

    Texts stream block by block; tasks and answers load each model whole, one after the other.
    Several processes share the windows of texts, and each returns the results of all.

    `against` is the dense model, which the others are compared with, and which questions need. It
    is measured too: first, unless it is among the names. Of a `Dense`, which is not among them,
    what it gave before is taken. `out` is a file for the results, which are read from it if it is
    there already. What is finished is kept beside it until then, and an interrupted run goes on.

    Returns:
        For each model: `model` (its name), `fingerprint`, `parameters`, `dtype`, `perplexity` by
        text (see `perplexity_of`), `windows` by text (their digest, predicted tokens and
        `WindowSums`), `agreement` of all but the dense model, with tasks `tasks` and `documents`
        (see `TaskRunner.score`), and with questions `answers` (see `answers_result`).
    """
    team = team or Team()
    if exam.questions is not None and against is None:
        raise UsageError("answers are compared with those of the dense model; add --against DENSE")
    check_texts(evaluation=exam.texts.names)  # before a model is downloaded or converted
    dense = against if isinstance(against, Dense) else None
    if isinstance(against, str | Path):
        names = [against, *(name for name in names if str(name) != str(against))]
    sources = [*([dense.source] if dense else []), *(open_checkpoint(name) for name in names)]
    if out is not None:
        for source in sources:  # there it would pass for a file of the model
            check_is_outside(out, source.directory)
    length = min(_window_length(exam.texts, source) for source in sources)
    exam = replace(exam, texts=replace(exam.texts, seqlen=length))
    models = [_Model.of(source, exam) for source in sources]
    if against is not None:
        _check_same_tokens(models)
    for each in models if against is None else ():
        if _other_tokens(each, models[0]):
            logger.warning(
                "%s cuts text into other tokens than %s: their perplexities do not compare",
                *(each.source.label, models[0].source.label),
            )
    asked = _Asked(exam, against is not None, dense, team)
    identity = _identity(models, asked)
    runtimes = [model.runtime for model in models]
    check_same_work(team, sources, runtimes, {"text": json.dumps(identity["texts"])})
    measure = partial(_measure, models, asked)
    if out is None:
        with temporary_work_dir() as work_dir:
            found = measure(work_dir)
    else:
        found = measured_into(out, identity, measure, exam.compute.memory_budget, team)
    results: list[dict[str, Any]] = found["models"]
    return results


def _measure(models: Sequence[_Model], asked: _Asked, work_dir: WorkDir) -> dict[str, Any]:
    """Return what the file of results has of models, and of tasks if there are any."""
    tasks, questions, known = asked.exam.tasks, asked.exam.questions, asked.known
    new = models[len(known) :]
    if tasks is not None or questions is not None:
        what = "answering questions" if tasks is None else "scoring tasks"
        for model in new:
            check_fits(model.source, model.runtime, what)
    if tasks is not None and not known:  # else they were read, and told of, for the dense model
        tasks.read_data()
    sums = {text: _measure_text(models, text, asked, work_dir) for text in models[0].windows}
    results = known + [
        model.result({text: of_models[number] for text, of_models in sums.items()})
        for number, model in enumerate(new)
    ]
    if asked.compares:
        for result in results[1:]:
            result["agreement"] = agreement_of(results[0], result)
    answers = [each["answers"]["documents"] for each in known if questions is not None]
    for number, model in enumerate(new, start=len(known)):
        whole = cache(model.whole)
        if tasks is not None:
            results[number].update(tasks.scores_of(whole, f"task-{number}", work_dir))
        if questions is not None:
            name, label = f"answers-{number}", f"{model.source.label} answers"
            answers.append(answers_of(model.prompts, whole, work_dir, name, label))
        del whole
    if questions is not None:
        windows = windows_of(models[0].prompts, answers[0])
        reading = [replace(model, windows={"answers": windows}) for model in models]
        of_models = _measure_text(reading, "answers", asked, work_dir)
        for number, its in enumerate(of_models, start=len(known)):
            model = models[number]
            label = f"{model.source.label} on answers"
            check_is_number(sum(its["loss"]), label, model.runtime.dtype)
            results[number]["answers"] = answers_result(
                questions, windows, its, answers[number], answers[0]
            )
    return {"models": results} | ({} if tasks is None else {"tasks": tasks.conditions()})


def _measure_text(
    models: Sequence[_Model], text: str, asked: _Asked, work_dir: WorkDir
) -> list[WindowSums]:
    """Return the sums on one text of every model that is not known, in parts by process.

    What leaves the last block of the dense model, the first, stays until the others have passed.
    """
    compares, budget = asked.compares, hidden_budget(asked.exam.compute.memory_budget)
    first = models[0]
    with temporary_work_dir(budget // 2 if compares else budget) as place:
        passes = replace(place, team=asked.team)
        dense = asked.dense or Dense(first.source, {}, passes)

        def stream(number: int) -> WindowSums:
            model, end = models[number], None
            windows = model.windows[text]
            is_dense = compares and number == 0
            if compares and not is_dense:
                if windows.digest not in dense.hidden:  # an earlier run had its sums already
                    stream(0)
                if windows.digest in dense.hidden:  # else this process has no windows
                    end = DenseEnd(first.source, first.runtime, dense.hidden[windows.digest])
            return streamed_sums(
                model.source,
                windows,
                model.runtime,
                dense.passes if is_dense else passes,
                f"{model.source.label} on {text}",
                dense=end,
                on_end=partial(dense.hidden.__setitem__, windows.digest) if is_dense else None,
            )

        found = []
        for number in range(len(asked.known), len(models)):
            name = f"text-{first.windows[text].digest[:16]}-{number}"
            own = load_or_compute(work_dir, name, partial(stream, number))
            found.append(joined_sums(asked.team.gather(own)))
        return found


def evaluation_windows(texts: EvaluationText, source: Checkpoint) -> dict[str, Windows]:
    """Read the windows of every evaluation text, so that no mistake is left for later."""
    if not texts.names:
        return {}
    tokenizer, length = load_tokenizer(source.directory), _window_length(texts, source)
    found = {}
    for text in texts.names:
        windows = consecutive_windows(
            text, tokenizer, count=texts.windows, seqlen=length, bos=texts.bos
        )
        check_tokens(source.config, windows.tokens_NT, source.label)
        found[name_of(text)] = windows
    return found


def perplexity_by_text(
    source: WeightSource,
    windows: Mapping[str, Windows],
    compute: Compute,
    work_dir: WorkDir,
    name: str,
) -> dict[str, dict[str, Any]]:
    """Return the perplexity of a model on each text, as JSON types.

    It has a name in the work directory, whose processes share the windows: what a killed run
    measured there is not measured again.
    """
    runtime, found = runtime_of(compute, source), {}
    for text, of_text in windows.items():
        label = f"{name} on {text}"
        sums = streamed_sums(source, of_text, runtime, work_dir, label)
        loss = sum(joined_sums(work_dir.team.gather(sums))["loss"])
        found[text] = perplexity_of(loss, of_text, label, runtime.dtype)
    return found


def _identity(models: Sequence[_Model], asked: _Asked) -> dict[str, Any]:
    """Return what results depend on, for what an interrupted run left."""
    tasks, questions = asked.exam.tasks, asked.exam.questions
    return {
        "command": "eval",
        "models": [each.facts["model"] for each in models],
        "weights, config or tokenizer": [each.source.identity for each in models],
        "batch of windows": asked.exam.compute.batch_windows,
        "dtypes": [each.facts["dtype"] for each in models],
        "texts": digests_of(models[0].windows),
        "dense model": models[0].facts["model"] if asked.compares else None,
        "tasks": None if tasks is None else tasks.identity(),
        "answers": questions and questions.identity(load_tokenizer(models[0].source.directory)),
        "version": {name: versions()[name] for name in ("cfsp-llm", "torch", "transformers")},
    }


def _window_length(texts: EvaluationText, source: WeightSource) -> int:
    if texts.seqlen is not None:
        return texts.seqlen
    return min(DEFAULT_SEQLEN, longest_input_of(source.config) or DEFAULT_SEQLEN)


def _other_tokens(model: _Model, first: _Model) -> list[str]:
    """Return the texts that a model cuts into other tokens than the first one."""
    return [
        text
        for text, windows in first.windows.items()
        if model.windows[text].digest != windows.digest
    ]


def _check_same_tokens(models: Sequence[_Model]) -> None:
    """Check that models can be compared token by token with the first one."""
    dense, *others = models
    for model in others:
        for text in _other_tokens(model, dense):
            raise UsageError(
                f"--against needs models with one tokenizer, but {model.source.label} cuts {text} "
                f"into other tokens than {dense.source.label}; measure them without --against"
            )
        if model.prompts != dense.prompts:
            raise UsageError(
                f"--answers needs models that are asked alike, but {model.source.label} has "
                f"another tokenizer or chat template than {dense.source.label}; leave it out"
            )
        found, expected = (vocabulary_of(each.source.config) for each in (model, dense))
        if found != expected:
            raise UsageError(
                f"--against needs models with one vocabulary, but {model.source.label} predicts "
                f"{found} tokens and {dense.source.label} {expected}; measure them without "
                "--against"
            )
