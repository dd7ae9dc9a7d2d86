"""Sensitivity of a block: how far the model's predictions move when that block alone is pruned.

Angular distance says how much a block does, sensitivity how much of that its weakest channels do.
It is measured by masking, forward passes only, on the whole model in memory: no block can be
dropped while others are tried. What enters a block does not depend on its own pruning, so only
the blocks from it on are computed again: half a forward pass for each block on average.

Shapes: N windows, T tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.families import family_of
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import hidden_states_entering, resumed_at
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.masks import check_can_be_masked, masked_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def block_sensitivities(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    kept_L: Sequence[Sequence[int]],
    on_block: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return how far each block's pruning alone moves the predictions, in nats per token.

    KL(dense || one block pruned), the mean over tokens; see `cfsp.whole_model.divergence`.

    Args:
        model: the whole dense model, in evaluation mode.
        tokens_NT: windows without padding; they pass one at a time.
        kept_L: channels of each block that stay when it is pruned.
        on_block: is called after each block of each window.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
    """
    family = family_of(model.config)
    check_can_be_masked(family)
    blocks = blocks_of(model, family)
    total_L = [0.0] * len(blocks)
    with torch.inference_mode():
        for tokens_T in tokens_NT:
            with hidden_states_entering(blocks) as entering_L:
                dense = dense_predictions(model, tokens_T[None])
            for index, kept_K in enumerate(kept_L):
                with (
                    masked_block(blocks[index], family, kept_K),
                    resumed_at(blocks, index, entering_L[index]),
                ):
                    total_L[index] += dense.divergence(model)
                on_block()
    return [total / len(tokens_NT) for total in total_L]
