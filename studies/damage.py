"""What the loss does when one block alone is pruned or left out, and how well a score ranks that.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from torch import nn

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.settings import DISTANCES
from cfsp.sweep.table import loss_rise
from subject import Subject


def damage_of(
    subject: Subject,
    statistics: Statistics,
    block: int,
    sparsity: float,
    before: dict[str, float],
) -> dict[str, float]:
    """Return every distance of a block and by how many nats the loss rises without it.

    Args:
        subject: the model.
        statistics: of its calibration.
        block: index of the block.
        sparsity: fraction of its channels that goes when it is pruned alone.
        before: perplexity of the dense model on each text.

    Returns:
        The distances by name; `pruned` and `left out`: rise of the loss, mean over the texts.
    """
    pruned = subject.quality_of_some(statistics, sparsity, [block])
    return {
        **{name: round(statistics.distances(name)[block], 6) for name in DISTANCES},
        "pruned": round(loss_rise(pruned, before), 5),
        "left out": round(loss_rise(_left_out(subject, block), before), 5),
    }


def _left_out(subject: Subject, block: int) -> dict[str, float]:
    """Return the perplexity on each text when one block passes its input on unchanged."""
    with _skipped(blocks_of(subject.model, subject.source.architecture)[block]):
        return subject.quality(subject.model)


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    def unchanged(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(unchanged, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def rank_correlation(first_L: Sequence[float], second_L: Sequence[float]) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank."""
    first, second = _ranks(first_L), _ranks(second_L)
    mean = (len(first) - 1) / 2
    products = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    squares = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (first, second)]
    return products / math.sqrt(squares[0] * squares[1]) if all(squares) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        fmean([rank for rank, other in enumerate(sorted(values)) if other == value])
        for value in values
    ]
