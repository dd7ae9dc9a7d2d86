"""Several models on the same texts and tasks; a model before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint, WeightSource, parameter_count
from cfsp.checkpoint.text_config import longest_input_of
from cfsp.engine.compute import engine_of
from cfsp.engine.whole import check_fits
from cfsp.engine.workplace import Workplace, temporary_workplace
from cfsp.quality.perplexity import Perplexity
from cfsp.quality.streaming import streamed_perplexity
from cfsp.settings import DEFAULT_SEQLEN, Compute, EvaluationText
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows, consecutive_windows

if TYPE_CHECKING:
    from cfsp.quality.tasks.harness import TaskRunner

logger = logging.getLogger(__name__)


def evaluate_models(
    names: Sequence[str | Path],
    texts: EvaluationText,
    compute: Compute,
    tasks: TaskRunner | None = None,
) -> list[dict[str, Any]]:
    """Measure several models on the same texts and tasks, in windows of the same length.

    Perplexity streams block by block; tasks load each model whole, one after the other.

    Returns:
        For each model: `model` (its name), `parameters`, `dtype`, `perplexity` by text (see
        `Perplexity.to_json`), and `tasks`, if any (see `TaskRunner.score`).

    Raises:
        CfspError: anything that a user can cause, mostly before the first forward pass.
    """
    check_texts(texts.names, "evaluation")  # before a model is downloaded or converted
    sources = [open_checkpoint(name) for name in names]
    length = min(_window_length(texts, source) for source in sources)
    windows = [evaluation_windows(replace(texts, seqlen=length), source) for source in sources]
    _warn_of_other_tokens(sources, windows)
    if tasks is not None:
        for source in sources:
            check_fits(source, engine_of(compute, source).dtype, "scoring tasks")
        tasks.read_data()
    results = []
    for source, of_texts in zip(sources, windows, strict=True):
        with temporary_workplace(compute.memory_budget) as place:
            found = _perplexities(source, of_texts, compute, place, source.label)
        engine = engine_of(compute, source)
        results.append(
            {
                "model": source.label,
                "parameters": parameter_count(source),
                "dtype": str(engine.dtype).removeprefix("torch."),
                "perplexity": {text: value.to_json() for text, value in found.items()},
            }
        )
        if tasks is not None:
            model = load(source.directory, dtype=engine.dtype, device=engine.device)
            results[-1]["tasks"] = tasks.score(model, load_tokenizer(source.directory))
            del model
    return results


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
    place: Workplace | None = None,
    labels: tuple[str, str] = ("dense", "pruned"),
) -> dict[str, dict[str, Any]]:
    """Return text -> {"before", "after"} and their conditions, as the manifest has them.

    Args:
        before: the one model.
        after: the other, with the same tokenizer.
        windows: of each text (see `evaluation_windows`).
        compute: how.
        place: where to spill and to save; None for a temporary one.
        labels: what progress calls the models.
    """
    if place is None:
        with temporary_workplace(compute.memory_budget) as temporary:
            return before_and_after(before, after, windows, compute, temporary, labels)
    first, second = (
        _perplexities(source, windows, compute, place, label)
        for source, label in zip((before, after), labels, strict=True)
    )
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
            name=f"perplexity-{Path(label).name}-{of_text.digest[:8]}",
            label=f"{label} on {text}",
        )
        for text, of_text in windows.items()
    }


def _window_length(texts: EvaluationText, source: WeightSource) -> int:
    if texts.seqlen is not None:
        return texts.seqlen
    return min(DEFAULT_SEQLEN, longest_input_of(source.config) or DEFAULT_SEQLEN)


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
