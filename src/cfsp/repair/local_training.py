"""Training of a few consecutive blocks alone, towards hidden states that are known.

There is no backward pass through the model: gradients reach from the last block's output to the
parameters of these blocks.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfsp.engine.two_streams import Batch, Loss
from cfsp.settings import LocalTraining

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3


def group_of(training: LocalTraining, index: int, blocks: int) -> range:
    """Return the blocks that train together with one, of a model with so many."""
    last = max(0, blocks - 2 * training.blocks)
    if index >= last:
        return range(last, blocks)
    first = index - index % training.blocks
    return range(first, min(first + training.blocks, last))


def highest_rate(training: LocalTraining, error: float, *, at_head: bool = False) -> float:
    """Return a block's highest learning rate.

    Args:
        training: how blocks are trained.
        error: of the hidden states that leave it, before training (`token_error`).
        at_head: whether it is in the last group.
    """
    highest = training.head_rate if at_head else training.rate
    return min(highest, training.rate_per_error * error)


def schedule(training: LocalTraining, *, at_head: bool = False) -> list[float]:
    """Return the learning rate of every step, as a part of the highest.

    Args:
        training: how blocks are trained.
        at_head: of the last group.
    """
    steps = 2 * training.steps if at_head else training.steps
    return [
        min(1.0, (step + 1) / training.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for step in range(steps)
    ]


@dataclass(frozen=True)
class Trained:
    """Parameters of one block that are trained alike.

    Attributes:
        parameters: they require gradients.
        rate: their highest learning rate, as a part of the root mean square of each.
    """

    parameters: Sequence[nn.Parameter]
    rate: float


def train_blocks(
    compute: Callable[[Tensor], Tensor],
    trained: Sequence[Trained],
    batches: Iterator[Batch],
    loss_of: Loss,
    schedule: Sequence[float],
    dtype: torch.dtype,
    on_step: Callable[[int], object] = lambda step: None,
) -> bool:
    """Train blocks to give the target hidden states, or what a loss makes of them.

    Args:
        compute: the blocks' function of the hidden states that enter the first, in float32.
        trained: its parameters.
        batches: as many as there are steps, or more.
        loss_of: loss of the output hidden states.
        schedule: learning rate of each step, as a part of the highest.
        dtype: what the blocks will compute in; products are in bfloat16 if this is.
        on_step: is called with the number of each step, from 0.

    Returns:
        Whether every loss was a number; training stops at one that is not.
    """
    # Before any step: a tensor's size is that of the pruned model.
    groups = [
        {"params": [parameter], "highest": block.rate * _size(parameter)}
        for block in trained
        for parameter in block.parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for step, part in enumerate(schedule):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = part * group["highest"]
        device = batch.input_BTD.device.type
        with torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
            output_BTD = compute(batch.input_BTD.float())
        loss = loss_of(output_BTD, batch)
        if not math.isfinite(float(loss.detach())):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step(step)
    return True


def _size(parameter: nn.Parameter) -> float:
    return max(_LEAST_SIZE, float(parameter.detach().square().mean().sqrt()))
