"""Several models on the same texts and tasks; a model before and after."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.calibration.calibrate import check_tokens
from cfsp.calibration.together import check_same_work, part_of
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint, WeightSource, fingerprint, parameter_count
from cfsp.checkpoint.text_config import longest_input_of, vocabulary_of
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.quality.agreement import DenseEnd, agreement_of
from cfsp.quality.answers import Questions, answers_of, answers_result, windows_of
from cfsp.quality.perplexity import (
    WindowSums,
    before_and_after,
    joined_sums,
    no_sums,
    perplexity_of,
    streamed_perplexity,
    streamed_sums,
)
from cfsp.quality.results_file import measured_into
from cfsp.settings import DEFAULT_SEQLEN, Compute, EvaluationText
from cfsp.streaming.decoder_end import Head
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.memory import default_budget
from cfsp.streaming.runtime import Runtime, check_fits, runtime_of, versions
from cfsp.streaming.work_dir import WorkDir, load_or_compute, output_work_dir, temporary_work_dir
from cfsp.text.drawing import consecutive_windows
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.quality.tasks.harness import TaskRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """A model that is measured, its windows and prompts, and what its results begin with."""

    source: Checkpoint
    runtime: Runtime
    windows: Mapping[str, Windows]
    prompts: Sequence[list[int]]
    facts: Mapping[str, Any]

    @staticmethod
    def of(
        source: Checkpoint, texts: EvaluationText, questions: Questions | None, compute: Compute
    ) -> _Model:
        runtime = runtime_of(compute, source)
        facts = {
            "model": source.label,
            "fingerprint": fingerprint(source),
            "parameters": parameter_count(source),
            "dtype": str(runtime.dtype).removeprefix("torch."),
        }
        prompts = []
        if questions is not None:
            prompts = questions.prompts(source, load_tokenizer(source.directory))
        return _Model(source, runtime, evaluation_windows(texts, source), prompts, facts)

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
            perplexity[text] = perplexity_of(sum(sums["loss"]), of_text, label).to_json()
            predicted = of_text.scored_N.tolist()
            windows[text] = {"digest": of_text.digest, "predicted": predicted, **sums}
        return {**self.facts, "perplexity": perplexity, "windows": windows}


def evaluate_models(
    names: Sequence[str | Path],
    texts: EvaluationText,
    compute: Compute,
    tasks: TaskRunner | None = None,
    *,
    questions: Questions | None = None,
    against: str | Path | None = None,
    out: Path | None = None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Measure several models on the same texts and tasks, in windows of the same length.

    Texts stream block by block; tasks and answers load each model whole, one after the other.
    Several processes share the windows of texts, and each returns the results of all.

    Args:
        names: the models.
        texts: what to measure perplexity on; may be none.
        compute: how.
        tasks: what to score; None for no tasks.
        questions: what to ask, which needs `against`; None for nothing.
        against: the dense model, which the others are compared with. It is measured too: first,
            unless it is among `names`. It streams once for each text, however many models there
            are.
        out: a file for the results, which are read from it if it is there already. What is
            finished is kept beside it until then, and an interrupted run goes on.
        team: the processes that measure together, of texts alone; None for this one.

    Returns:
        For each model: `model` (its name), `fingerprint`, `parameters`, `dtype`, `perplexity` by
        text (see `Perplexity.to_json`), `windows` by text (their digest, predicted tokens and
        `WindowSums`), `agreement` of all but the dense model, with tasks `tasks` and `documents`
        (see `TaskScorer.score`), and with questions `answers` (see `answers_result`).

    Raises:
        CfspError: anything that a user can cause, mostly before the first forward pass.
        OutputError: the file is there, and of something else.
    """
    team = team or Team()
    if questions is not None and against is None:
        raise UsageError("answers are compared with those of the dense model; add --against DENSE")
    check_texts(evaluation=texts.names)  # before a model is downloaded or converted
    if against is not None:
        names = [against, *(name for name in names if str(name) != str(against))]
    sources = [open_checkpoint(name) for name in names]
    length = min(_window_length(texts, source) for source in sources)
    texts = replace(texts, seqlen=length)
    models = [_Model.of(source, texts, questions, compute) for source in sources]
    if against is not None:
        _check_same_tokens(models)
    for each in models if against is None else ():
        if _other_tokens(each, models[0]):
            logger.warning(
                "%s cuts text into other tokens than %s: their perplexities do not compare",
                *(each.source.label, models[0].source.label),
            )
    identity = _identity(models, against, tasks, questions, compute)
    check_same_work(team, sources, {"text": json.dumps(identity["texts"])})

    def measure() -> dict[str, Any]:
        budget = compute.memory_budget
        beside = output_work_dir(out, identity, budget, team) if out else nullcontext()
        with beside as work_dir:
            return _measure(models, tasks, questions, against is not None, compute, work_dir, team)

    found = measure() if out is None else measured_into(out, identity, measure, team)
    results: list[dict[str, Any]] = found["models"]
    return results


def _measure(
    models: Sequence[_Model],
    tasks: TaskRunner | None,
    questions: Questions | None,
    compares: bool,
    compute: Compute,
    work_dir: WorkDir | None,
    team: Team,
) -> dict[str, Any]:
    """Return what the file of results has of models, and of tasks if there are any."""
    if tasks is not None or questions is not None:
        what = "answering questions" if tasks is None else "scoring tasks"
        for model in models:
            check_fits(model.source, model.runtime, what)
    if tasks is not None:
        tasks.read_data()
    sums = {
        text: _measure_text(models, text, number, compares, compute, work_dir, team)
        for number, text in enumerate(models[0].windows)
    }
    results = [
        model.result({text: of_models[number] for text, of_models in sums.items()})
        for number, model in enumerate(models)
    ]
    if compares:
        for result in results[1:]:
            result["agreement"] = agreement_of(results[0], result)
    answers = []
    for number, model in enumerate(models):
        whole = cache(model.whole)
        if tasks is not None:
            results[number].update(tasks.scores_of(whole, f"task-{number}", work_dir))
        if questions is not None:
            name, label = f"answers-{number}", f"{model.source.label} answers"
            own = answers_of(model.prompts, whole, work_dir, name, label)
            answers.append(own)
        del whole
    if questions is not None:
        windows = windows_of(models[0].prompts, answers[0])
        asked = [replace(model, windows={"answers": windows}) for model in models]
        of_models = _measure_text(asked, "answers", len(sums), compares, compute, work_dir, team)
        for result, own, its in zip(results, answers, of_models, strict=True):
            result["answers"] = answers_result(questions, windows, its, own, answers[0])
    return {"models": results} | ({} if tasks is None else {"tasks": tasks.conditions()})


def _measure_text(
    models: Sequence[_Model],
    text: str,
    text_number: int,
    compares: bool,
    compute: Compute,
    work_dir: WorkDir | None,
    team: Team,
) -> list[WindowSums]:
    """Return the sums of every model on one text, of which each process measures a part.

    With `compares` the first model is the dense one: what leaves its last block stays until the
    others have passed.
    """
    budget = compute.memory_budget or default_budget()
    with temporary_work_dir(budget // 2 if compares else budget) as passes:
        ends: list[DenseEnd] = []

        def stream(number: int) -> WindowSums:
            model, is_compared = models[number], compares and number > 0
            runtime, label = model.runtime, f"{model.source.label} on {text}"
            windows = model.windows[text]
            own = windows.part(part_of(windows, team, runtime.batch_windows))
            if not len(own.tokens_NT):
                return no_sums(compared=is_compared)

            def keep(hidden: HiddenStates) -> None:
                if compares and number == 0:
                    head = Head(model.source, runtime.device, runtime.dtype)
                    ends.append(DenseEnd(head, hidden, runtime.device))

            if is_compared and not ends:  # an earlier run had its sums already
                stream(0)
            sums = streamed_sums(
                model.source,
                own,
                runtime,
                work_dir=passes,
                name=f"perplexity-{number}",
                label=label,
                dense=ends[0] if ends and is_compared else None,
                on_end=keep,
            )
            perplexity_of(sum(sums["loss"]), own, label)  # no NaN
            return sums

        found = []
        for number in range(len(models)):
            own = load_or_compute(work_dir, f"text-{text_number}-{number}", partial(stream, number))
            found.append(joined_sums(team.gather(own)))
        return found


def evaluation_windows(texts: EvaluationText, source: Checkpoint) -> dict[str, Windows]:
    """Read the windows of every evaluation text, so that no mistake is left for later."""
    if not texts.names:
        return {}
    tokenizer, length = load_tokenizer(source.directory), _window_length(texts, source)
    found = {}
    for text in texts.names:
        windows = consecutive_windows(
            text,
            tokenizer,
            count=texts.windows,
            seqlen=length,
            bos=texts.bos,
        )
        check_tokens(source.config, windows.tokens_NT, source.label)
        found[name_of(text)] = windows
    return found


def measure_both(
    before: WeightSource,
    after: WeightSource,
    windows: Mapping[str, Windows],
    compute: Compute,
    work_dir: WorkDir,
) -> dict[str, dict[str, Any]]:
    """Return the perplexities of both on each text, as the manifest has them."""

    def measure(source: WeightSource, label: str) -> dict[str, dict[str, Any]]:
        runtime = runtime_of(compute, source)
        return {
            text: streamed_perplexity(
                source,
                of_text,
                runtime,
                work_dir=work_dir,
                name=f"perplexity-{label}-{of_text.digest[:8]}",
                label=f"{label} on {text}",
            ).to_json()
            for text, of_text in windows.items()
        }

    return before_and_after(measure(before, "dense"), measure(after, "pruned"))


def _identity(
    models: Sequence[_Model],
    against: str | Path | None,
    tasks: TaskRunner | None,
    questions: Questions | None,
    compute: Compute,
) -> dict[str, Any]:
    """Return what results depend on, for what an interrupted run left."""
    return {
        "command": "eval",
        "models": [each.facts["model"] for each in models],
        "weights": [each.facts["fingerprint"] for each in models],
        "batch of windows": compute.batch_windows,
        "dtypes": [each.facts["dtype"] for each in models],
        "texts": {text: of_text.digest for text, of_text in models[0].windows.items()},
        "dense model": None if against is None else str(against),
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
                f"--against needs models with one tokenizer, but {model.source.label} cuts "
                f"{text} into other tokens than {dense.source.label}; measure them without "
                "--against"
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
