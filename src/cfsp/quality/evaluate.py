"""Several models on the same texts and tasks; a model before and after."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.calibration.calibrate import check_tokens
from cfsp.calibration.together import check_same_work, part_of
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint, WeightSource, fingerprint, parameter_count
from cfsp.checkpoint.text_config import longest_input_of, vocabulary_of
from cfsp.engine.compute import Engine, engine_of
from cfsp.engine.head import Head
from cfsp.engine.hidden_states import HiddenStates
from cfsp.engine.memory import default_budget
from cfsp.engine.versions import versions
from cfsp.engine.whole import check_fits
from cfsp.engine.workplace import Workplace, kept, output_workplace, temporary_workplace
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.quality.agreement import DenseEnd
from cfsp.quality.paired import difference, geometric_mean, per_count
from cfsp.quality.perplexity import Perplexity, perplexity_of
from cfsp.quality.streaming import WindowSums, streamed_perplexity, streamed_sums
from cfsp.settings import DEFAULT_SEQLEN, Compute, EvaluationText
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows, consecutive_windows

if TYPE_CHECKING:
    from cfsp.quality.tasks.harness import TaskRunner, TaskScorer

logger = logging.getLogger(__name__)


def evaluate_models(
    names: Sequence[str | Path],
    texts: EvaluationText,
    compute: Compute,
    tasks: TaskRunner | None = None,
    *,
    against: str | Path | None = None,
    out: Path | None = None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """Measure several models on the same texts and tasks, in windows of the same length.

    Texts stream block by block; tasks load each model whole, one after the other. Several processes
    share the windows of texts, and each returns the results of all.

    Args:
        names: the models.
        texts: what to measure perplexity on; may be none.
        compute: how.
        tasks: what to score; None for no tasks.
        against: the dense model, which the others are compared with. It is measured too: first,
            unless it is among `names`. It streams once for each text, however many models there
            are.
        out: a file that the results will be written to by the caller: what is finished is kept
            beside it until then, and an interrupted run goes on.
        team: the processes that measure together, of texts alone; None for this one.

    Returns:
        For each model: `model` (its name), `fingerprint`, `parameters`, `dtype`, `perplexity` by
        text (see `Perplexity.to_json`), `windows` by text (see `_windows_json`), `agreement` of
        all but the dense model, and with tasks `tasks` and `documents` (see `TaskRunner.score`).

    Raises:
        CfspError: anything that a user can cause, mostly before the first forward pass.
    """
    team = team or Team()
    check_texts(texts.names, "evaluation")  # before a model is downloaded or converted
    if against is not None:
        names = [against, *(name for name in names if str(name) != str(against))]
    sources = [open_checkpoint(name) for name in names]
    length = min(_window_length(texts, source) for source in sources)
    windows = [evaluation_windows(replace(texts, seqlen=length), source) for source in sources]
    if against is None:
        _warn_of_other_tokens(sources, windows)
    else:
        _check_same_tokens(sources, windows)
    if tasks is not None:
        for source in sources:
            check_fits(source, engine_of(compute, source), "scoring tasks")
        tasks.read_data()
    engines = [engine_of(compute, source) for source in sources]
    dtypes = [str(engine.dtype).removeprefix("torch.") for engine in engines]
    results: list[dict[str, Any]] = [
        {
            "model": source.label,
            "fingerprint": fingerprint(source),
            "parameters": parameter_count(source),
            "dtype": dtype,
            "perplexity": {},
            "windows": {},
        }
        for source, dtype in zip(sources, dtypes, strict=True)
    ]
    identity = _identity(results, windows, against, tasks, compute)
    check_same_work(team, sources, {"text": json.dumps(identity["texts"])})
    with _place_beside(out, identity, compute, team) as place:
        for number, text in enumerate(windows[0]):
            of_text = [of_texts[text] for of_texts in windows]
            measured = _measure_text(
                sources, of_text, engines, text, number, against is not None, compute, place, team
            )
            for result, of_model, sums in zip(results, of_text, measured, strict=True):
                label = f"{result['model']} on {text}"
                value = perplexity_of(sum(sums.loss), of_model, label)
                result["perplexity"][text] = value.to_json()
                result["windows"][text] = _windows_json(sums, of_model)
        if tasks is not None:
            for number, (source, engine) in enumerate(zip(sources, engines, strict=True)):
                results[number].update(_score_tasks(tasks, source, engine, number, place))
    if against is not None:
        for result in results[1:]:
            result["agreement"] = _agreement(results[0], result)
    return results


def _measure_text(
    sources: Sequence[Checkpoint],
    windows: Sequence[Windows],
    engines: Sequence[Engine],
    text: str,
    number: int,
    compares: bool,
    compute: Compute,
    place: Workplace | None,
    team: Team,
) -> list[WindowSums]:
    """Return the sums of every model on one text, of which each process measures a part.

    With `compares` the first model is the dense one: what leaves its last block stays until the
    others have passed.
    """
    budget = compute.memory_budget or default_budget()
    with temporary_workplace(budget // 2 if compares else budget) as passes:
        ends: list[DenseEnd] = []

        def stream(model: int) -> dict[str, Any]:
            source, engine = sources[model], engines[model]
            own = windows[model].part(part_of(windows[model], team, engine.batch_windows))
            if not len(own.tokens_NT):
                return asdict(WindowSums((), (), ()) if compares and model else WindowSums(()))

            def keep(hidden: HiddenStates) -> None:
                if compares and model == 0:
                    head = Head(source, engine.device, engine.dtype)
                    ends.append(DenseEnd(head, hidden, engine.device))

            if compares and model > 0 and not ends:  # an earlier run had its sums already
                stream(0)
            sums = streamed_sums(
                source,
                own,
                engine,
                place=passes,
                name=f"perplexity-{model}",
                label=f"{source.label} on {text}",
                dense=ends[0] if ends and model > 0 else None,
                on_end=keep,
            )
            perplexity_of(sum(sums.loss), own, f"{source.label} on {text}")  # no NaN
            return asdict(sums)

        found = []
        for model in range(len(sources)):
            own = kept(place, f"text-{number}-{model}", partial(stream, model))
            found.append(WindowSums.joined(team.gather(WindowSums.from_json(own))))
        return found


def _score_tasks(
    tasks: TaskRunner, source: Checkpoint, engine: Engine, number: int, place: Workplace | None
) -> dict[str, Any]:
    """Return the `tasks` and `documents` of a model, which is loaded if any are missing."""
    scorers: list[TaskScorer] = []

    def score(name: str) -> dict[str, Any]:
        if not scorers:
            model = load(source.directory, dtype=engine.dtype, device=engine.device)
            scorers.append(tasks.scorer(model, load_tokenizer(source.directory)))
        return scorers[0].score(name)

    found: dict[str, Any] = {"tasks": {}, "documents": {}}
    for position, name in enumerate(tasks.selection.task_names):
        scored = kept(place, f"task-{number}-{position}", partial(score, name))
        for key in found:
            found[key].update(scored[key])
    return found


def evaluation_windows(texts: EvaluationText | None, source: Checkpoint) -> dict[str, Windows]:
    """Read the windows of every evaluation text, so that no mistake is left for later.

    Args:
        texts: what to measure on; None for nothing.
        source: the model; its tokenizer lies beside it.

    Raises:
        TextError: a text is missing or too short.
        UsageError: the windows are longer than what the model can read.
        CalibrationError: the tokenizer belongs to another model.
    """
    if texts is None or not texts.names:
        return {}
    tokenizer, length = load_tokenizer(source.directory), _window_length(texts, source)
    found = {}
    for text in texts.names:
        windows = consecutive_windows(
            text,
            tokenizer,
            count=texts.windows,
            seqlen=length,
            stride=texts.stride,
            bos=texts.bos,
        )
        check_tokens(source.config, windows.tokens_NT, source.label)
        found[name_of(text)] = windows
    return found


def before_and_after(
    before: WeightSource,
    after: WeightSource,
    windows: Mapping[str, Windows],
    compute: Compute,
    place: Workplace,
) -> dict[str, dict[str, Any]]:
    """Return text -> {"before", "after"} and their conditions, as the manifest has them.

    Args:
        before: the one model.
        after: the other, with the same tokenizer.
        windows: of each text (see `evaluation_windows`).
        compute: how.
        place: where to spill and to save.
    """
    first = _perplexities(before, windows, compute, place, "dense")
    second = _perplexities(after, windows, compute, place, "pruned")
    return {
        text: {
            "before": round(value.value, 4),
            "after": round(second[text].value, 4),
            **value.conditions,
        }
        for text, value in first.items()
    }


def _perplexities(
    source: WeightSource,
    windows: Mapping[str, Windows],
    compute: Compute,
    place: Workplace,
    label: str,
) -> dict[str, Perplexity]:
    engine = engine_of(compute, source)
    return {
        text: streamed_perplexity(
            source,
            of_text,
            engine,
            place=place,
            name=f"perplexity-{label}-{of_text.digest[:8]}",
            label=f"{label} on {text}",
        )
        for text, of_text in windows.items()
    }


def _windows_json(sums: WindowSums, windows: Windows) -> dict[str, Any]:
    """Return what pairs are compared by: sums over each window, and which windows they were."""
    found: dict[str, Any] = {
        "digest": windows.digest,
        "predicted": windows.scored_N.tolist(),
        "loss": list(sums.loss),
    }
    if sums.divergence is not None and sums.agreed is not None:
        found |= {"divergence": list(sums.divergence), "agreed": list(sums.agreed)}
    return found


def _agreement(dense: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model is from the dense one, by text and in sum."""
    by_text: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for text, sums in model["windows"].items():
        counts = sums["predicted"]
        rise = per_count(difference(dense["windows"][text]["loss"], sums["loss"]), counts)
        ratios[text] = math.exp(min(rise.value, 700.0))
        by_text[text] = {
            "perplexity_ratio": round(ratios[text], 6),
            "loss_rise": rise.to_json(),
            "divergence": per_count(sums["divergence"], counts).to_json(),
            "agreed": per_count(sums["agreed"], counts).to_json(),
        }
    found: dict[str, Any] = {
        "against": dense["model"],
        "fingerprint": dense["fingerprint"],
        "texts": by_text,
    }
    if ratios:
        worst = max(ratios, key=lambda text: ratios[text])
        found |= {
            "perplexity_ratio": round(geometric_mean(list(ratios.values())), 6),
            "worst": {"text": worst, "perplexity_ratio": round(ratios[worst], 6)},
        }
    return found


def _identity(
    results: Sequence[dict[str, Any]],
    windows: Sequence[Mapping[str, Windows]],
    against: str | Path | None,
    tasks: TaskRunner | None,
    compute: Compute,
) -> dict[str, Any]:
    """Return what results depend on, for what an interrupted run left."""
    return {
        "command": "eval",
        "models": [[result["model"], result["fingerprint"]] for result in results],
        "batch of windows": compute.batch_windows,
        "dtypes": [result["dtype"] for result in results],
        "texts": {text: of_text.digest for text, of_text in windows[0].items()},
        "dense model": None if against is None else str(against),
        "tasks": None if tasks is None else tasks.identity(),
        "version": {name: versions()[name] for name in ("cfsp-llm", "torch", "transformers")},
    }


@contextmanager
def _place_beside(
    out: Path | None, identity: dict[str, Any], compute: Compute, team: Team
) -> Iterator[Workplace | None]:
    if out is None:
        yield None
    else:
        with output_workplace(out, identity, compute.memory_budget, team) as place:
            yield place


def _window_length(texts: EvaluationText, source: WeightSource) -> int:
    if texts.seqlen is not None:
        return texts.seqlen
    return min(DEFAULT_SEQLEN, longest_input_of(source.config) or DEFAULT_SEQLEN)


def _check_same_tokens(
    sources: Sequence[Checkpoint], windows: Sequence[Mapping[str, Windows]]
) -> None:
    """Check that models can be compared token by token with the first one."""
    dense = sources[0]
    for source, of_texts in zip(sources[1:], windows[1:], strict=True):
        for text, first in windows[0].items():
            if of_texts[text].digest != first.digest:
                raise UsageError(
                    f"--against needs models with one tokenizer, but {source.label} cuts {text} "
                    f"into other tokens than {dense.label}; measure them without --against"
                )
        found, expected = (vocabulary_of(each.config) for each in (source, dense))
        if found != expected:
            raise UsageError(
                f"--against needs models with one vocabulary, but {source.label} predicts {found} "
                f"tokens and {dense.label} {expected}; measure them without --against"
            )


def _warn_of_other_tokens(
    sources: Sequence[Checkpoint], windows: Sequence[Mapping[str, Windows]]
) -> None:
    for source, of_texts in zip(sources[1:], windows[1:], strict=True):
        if any(of_texts[text].digest != first.digest for text, first in windows[0].items()):
            logger.warning(
                "%s cuts text into other tokens than %s: their perplexities do not compare",
                source.label,
                sources[0].label,
            )
