"""Several models on the same texts and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.loading import compute_device, load
from cfsp.checkpoint.locating import locate_model
from cfsp.quality.perplexity import Perplexity, perplexity
from cfsp.settings import Compute, EvaluationText
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import consecutive_windows

if TYPE_CHECKING:
    from cfsp.quality.tasks.harness import TaskRunner


def evaluate_models(
    names: Sequence[str | Path],
    texts: EvaluationText,
    compute: Compute,
    tasks: TaskRunner | None = None,
) -> list[dict[str, Any]]:
    """Measure several models on the same texts and tasks.

    Returns:
        For each model: its name, parameters, dtype, perplexity by text, predicted tokens by
        text, window length, stride and whether windows begin with BOS, and scores by task (see
        `TaskRunner.score`).
    """
    check_texts(texts.names, "evaluation")
    return [_evaluate(name, str(name), texts, compute, tasks) for name in names]


def before_and_after(
    before: Path,
    after: Path,
    texts: EvaluationText | None,
    compute: Compute,
    labels: tuple[str, str] = ("dense", "pruned"),
) -> dict[str, dict[str, float]]:
    """Return text -> {"before", "after", "tokens"} for a model and what became of it.

    Args:
        before: the one checkpoint.
        after: the other.
        texts: what to measure on; None or none for nothing.
        compute: how.
        labels: what progress calls them.
    """
    if texts is None or not texts.names:
        return {}
    first, second = (
        _evaluate(path, label, texts, compute)
        for path, label in zip((before, after), labels, strict=True)
    )
    return {
        text: {
            "before": first["perplexity"][text],
            "after": second["perplexity"][text],
            "tokens": first["tokens"][text],
        }
        for text in map(name_of, texts.names)
    }


def _evaluate(
    name: str | Path,
    label: str,
    texts: EvaluationText,
    compute: Compute,
    tasks: TaskRunner | None = None,
) -> dict[str, Any]:
    model = load(name, dtype=compute.dtype, device=compute_device(compute.device))
    tokenizer = load_tokenizer(locate_model(name))
    results: dict[str, Perplexity] = {}
    bos = False
    for text in texts.names:
        windows = consecutive_windows(
            text,
            tokenizer,
            count=texts.windows,
            seqlen=texts.seqlen,
            stride=texts.stride,
            bos=texts.bos,
        )
        bos = windows.bos
        results[name_of(text)] = perplexity(model, windows, f"{label} on {name_of(text)}")
    return {
        "model": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "perplexity": {text: round(result.value, 4) for text, result in results.items()},
        "tokens": {text: result.tokens for text, result in results.items()},
        "seqlen": texts.seqlen,
        "stride": texts.stride,
        "bos": bos,
        **({"tasks": tasks.score(model, tokenizer)} if tasks else {}),
    }
