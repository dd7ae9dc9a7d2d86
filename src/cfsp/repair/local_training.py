"""Training of a few consecutive blocks alone, towards hidden states that are known.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.processes import Team
from cfsp.settings import LocalTraining
from cfsp.streaming.two_streams import Batch, Loss

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3


def group_of(training: LocalTraining, index: int, blocks: int) -> range:
    """Return the blocks that train together with one, of a model with so many."""
    last = max(0, blocks - 2 * training.blocks)
    if index >= last:
        return range(last, blocks)
    first = index - index % training.blocks
    return range(first, min(first + training.blocks, last))


def highest_rate(training: LocalTraining, error: float, *, at_head: bool) -> float:
    """Return a block's highest learning rate, from the `token_error` of what leaves it before."""
    highest = training.head_rate if at_head else training.rate
    return min(highest, training.rate_per_error * error)


def schedule(training: LocalTraining, *, at_head: bool) -> list[float]:
    """Return the learning rate of every step, as a part of the highest."""
    steps = 2 * training.steps if at_head else training.steps
    return [
        min(1.0, (step + 1) / training.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for step in range(steps)
    ]


# Parameters of one block, which require gradients, and their highest learning rate: as a part of
# the root mean square of each.
Trained = tuple[Sequence[nn.Parameter], float]


def train_blocks(
    compute: Callable[[Tensor], Tensor],
    trained: Iterable[Trained],
    steps: Iterable[tuple[float, Batch]],
    loss_of: Loss,
    dtype: torch.dtype,
    team: Team,
    on_step: Callable[[], object] = lambda: None,
) -> bool:
    """Train blocks to give the target hidden states, or what a loss makes of them.

    Several processes with the same batches share the windows of each. All see the loss of the whole
    batch, and gradients are added up, so that they train as one would.

    Args:
        compute: the blocks' function of the hidden states that enter the first, in float32.
        trained: its parameters.
        steps: the learning rate of each step, as a part of the highest, and its batch.
        loss_of: loss of the output hidden states.
        dtype: what the blocks will compute in; products are in bfloat16 if this is.
        team: the processes that train together.
        on_step: is called after each step.

    Returns:
        Whether every loss was a number; training stops at one that is not.
    """
    # Before any step: a tensor's size is that of the pruned model.
    groups = [
        {"params": [parameter], "highest": rate * _size(parameter)}
        for parameters, rate in trained
        for parameter in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for part, batch in steps:
        for group in optimizer.param_groups:
            group["lr"] = part * group["highest"]
        device = batch.input_BTD.device.type
        own = team.share(len(batch.input_BTD))
        output_BTD = batch.input_BTD[own].float()
        with torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
            if len(output_BTD):
                output_BTD = compute(output_BTD)
        loss = loss_of(_of_all(output_BTD, batch, team), batch)
        if not math.isfinite(float(loss.detach())):
            return False
        optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        _add_up_gradients(optimizer, team)
        optimizer.step()
        on_step()
    return True


def _of_all(own_BTD: Tensor, batch: Batch, team: Team) -> Tensor:
    """Return the outputs of a whole batch from those of each process; gradients reach its own."""
    if team.size == 1:
        return own_BTD
    apply: Any = _OfAll.apply
    output_BTD: Tensor = apply(own_BTD, len(batch.input_BTD), team)
    return output_BTD


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_BTD: Tensor, windows: int, team: Team) -> Tensor:
        ctx.own, ctx.dtype = team.share(windows), own_BTD.dtype
        output_BTD = own_BTD.new_zeros((windows, *own_BTD.shape[1:]), dtype=torch.float32)
        output_BTD[ctx.own] = own_BTD
        return team.add_up(output_BTD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][ctx.own].to(ctx.dtype), None, None


def _add_up_gradients(optimizer: torch.optim.Optimizer, team: Team) -> None:
    """Make the gradients of all processes those of the whole batch."""
    if team.size == 1:
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # this process has no window of the batch
            parameter.grad = torch.zeros_like(parameter)
    team.add_up_each(parameter.grad for parameter in parameters)


def _size(parameter: nn.Parameter) -> float:
    return max(_LEAST_SIZE, float(parameter.detach().square().mean().sqrt()))
