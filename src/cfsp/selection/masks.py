"""A model under a plan without cutting it: weights that read pruned channels are zero meanwhile.

What a plan costs can so be measured on one model in memory, plan after plan, without writing a
checkpoint. All other weights stay as they are, so the result is that of `--repair none`.

Shapes: D hidden, F FFN channels, K kept, P pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.architecture.expert_proof import masked_experts
from cfsp.architecture.resizing import Gone
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.quality.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.text.windows import Windows


def masked_loss(
    source: WeightSource,
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Windows,
    label: str = "eval",
) -> float:
    """Return the mean negative log-likelihood of a model under a plan, in nats per token.

    It is that of the pruned model before repair, up to rounding.

    Args:
        source: the dense model that the plan was made for.
        model: the whole of it in memory, in evaluation mode.
        plan: which channels stay.
        windows: token windows without padding; the first token of each is not predicted.
        label: what the progress bar says.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
    """
    with masked_channels(source, model, dict(enumerate(plan.kept_channels))):
        return math.log(perplexity(model, windows, label).value)


@contextmanager
def masked_channels(
    source: WeightSource, model: PreTrainedModel, kept: Mapping[int, Sequence[int]]
) -> Iterator[None]:
    """Let a model compute as if it had some of its FFN channels only.

    Args:
        source: the dense model.
        model: the whole of it in memory.
        kept: FFN unit -> channels that stay, numbered through over the unit's FFNs; a unit that is
            not named keeps all.
    """
    blocks = blocks_of(model, source.architecture)
    with ExitStack() as stack:
        for index, kept_K in kept.items():
            unit = source.units[index]
            stack.enter_context(masked_unit(blocks[unit.block], unit, kept_K))
        yield


@contextmanager
def without_attention(block: nn.Module, unit: Unit) -> Iterator[None]:
    """Let a decoder block run as if one of its attentions were gone."""
    attention = block.get_submodule(unit.path)
    block.set_submodule(unit.path, Gone(unit.extras))
    try:
        yield
    finally:
        block.set_submodule(unit.path, attention)


@contextmanager
def masked_unit(block: nn.Module, unit: Unit, kept_K: Sequence[int]) -> Iterator[None]:
    """Let one unit of a decoder block compute as if it had the kept channels only.

    The pruned columns of its down projections are zero meanwhile, and kept elsewhere. To experts
    that keep none the router sends no token, and an attention that keeps none is not there.
    """
    if unit.part == "kv" and not kept_K:
        with without_attention(block, unit):
            yield
        return
    axis = unit.axes[unit.down].axis
    down = block.get_parameter(unit.down).detach()
    matrices = [down]
    if down.ndim == 3:  # those of all experts
        matrices, axis = list(down), axis - 1
    is_pruned_EF = torch.ones(unit.ffns, unit.width, dtype=torch.bool)
    is_pruned_EF.view(-1)[list(kept_K)] = False
    pruned = [
        unit.axes[unit.down].index(is_pruned_F.nonzero().flatten(), unit.width).to(down.device)
        for is_pruned_F in is_pruned_EF
    ]
    saved: list[Tensor] = []
    staying = (~is_pruned_EF).any(1).nonzero().flatten().tolist()
    with ExitStack() as stack:
        stack.callback(_put_back, matrices, axis, pruned, saved)
        if 0 < len(staying) < unit.ffns and unit.expert_axes:
            stack.enter_context(masked_experts(block, unit, staying))
        for matrix, pruned_P in zip(matrices, pruned, strict=True):
            saved.append(matrix.index_select(axis, pruned_P))
            matrix.index_fill_(axis, pruned_P, 0)
        yield


def _put_back(
    matrices: Sequence[Tensor], axis: int, pruned: Sequence[Tensor], saved: Sequence[Tensor]
) -> None:
    """Give matrices their pruned columns again."""
    # Fewer are saved than there are where the loop was interrupted.
    for matrix, pruned_P, columns in zip(matrices, pruned, saved, strict=False):
        matrix.index_copy_(axis, pruned_P, columns)
