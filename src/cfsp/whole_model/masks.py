"""A model under a plan without cutting it: pruned channels are zeroed where they are read.

What a plan costs can so be measured on one model in memory, plan after plan, without writing a
checkpoint. Weights stay as they are, so the result is that of `--repair none`.

Shapes: B windows, T tokens, F FFN channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.checkpoint.families import architecture_of, family_of
from cfsp.checkpoint.skeleton import blocks_of, projection_of
from cfsp.errors import UnsupportedModelError
from cfsp.quality.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.families import Family
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.text.windows import Windows


def masked_loss(
    model: PreTrainedModel, plan: PruningPlan, windows: Windows, label: str = "eval"
) -> float:
    """Return the mean negative log-likelihood of a model under a plan, in nats per token.

    It is that of the pruned model before repair, up to rounding.

    Args:
        model: the whole dense model that the plan was made for, in evaluation mode.
        plan: which channels stay.
        windows: token windows without padding; the first token of each is not predicted.
        label: what the progress bar says.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
    """
    with masked_channels(model, dict(enumerate(plan.kept_channels))):
        return math.log(perplexity(model, windows, label).value)


@contextmanager
def masked_channels(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Let a model compute as if it had some of its FFN channels only.

    Args:
        model: the whole dense model.
        kept: block -> channels that stay; a block that is not named keeps all.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
    """
    family = family_of(model.config)
    check_can_be_masked(family)
    blocks = blocks_of(model, architecture_of(model.config))
    with ExitStack() as stack:
        for block, kept_K in kept.items():
            stack.enter_context(masked_block(blocks[block], family, kept_K))
        yield


@contextmanager
def masked_block(block: nn.Module, family: Family, kept_K: Sequence[int]) -> Iterator[None]:
    """Let one decoder block compute as if it had the kept channels only."""
    down = projection_of(block, family, family.down)
    index_K = torch.tensor(kept_K, dtype=torch.int64)
    mask_F: Tensor | None = None

    def zero_pruned(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal mask_F
        act_BTF = args[0]
        if mask_F is None:
            mask_F = act_BTF.new_zeros(act_BTF.shape[-1])
            mask_F[index_K.to(act_BTF.device)] = 1
        return (act_BTF * mask_F, *args[1:])

    handle = down.register_forward_pre_hook(zero_pruned)
    try:
        yield
    finally:
        handle.remove()


def check_can_be_masked(family: Family) -> None:
    """Check that a family keeps its down projections in modules of their own.

    Raises:
        UnsupportedModelError: it does not: experts are computed in groups.
    """
    if family.experts is not None:
        raise UnsupportedModelError(
            f"the loss of a plan cannot be measured without pruning for {family.model_type}: its "
            "blocks are mixtures of experts, which are computed in groups; prune, then cfsp eval"
        )
