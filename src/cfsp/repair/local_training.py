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

from cfsp.errors import UsageError

DEFAULT_STEPS = 100
DEFAULT_BLOCKS = 3
DEFAULT_TEXT = 0.5

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3
# The root of zero has no gradient, and a block that loses no channel may have no error.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class Batch:
    """Windows that blocks are trained on, or judged by.

    Attributes:
        input_BTD: hidden states of the pruned stream that enter the first of the blocks.
        target_BTD: those of the dense stream that leave the last of them.
        tokens_BT: the text.
        turn: number of the batch among those of its kind, from 0.
    """

    input_BTD: Tensor
    target_BTD: Tensor
    tokens_BT: Tensor
    turn: int


# Of the hidden states that the blocks give for a batch, BTD.
Loss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class LocalTraining:
    """How blocks are trained.

    Attributes:
        steps: of Adam, in each group of blocks; twice as many in the last group.
        blocks: how many consecutive blocks train together, towards the hidden states after the
            last of them. The time hardly depends on it; what training holds in memory does. The
            model's last group, whose goal is what counts in the end, is twice as large.
        text: the part of the text itself in the last group's loss, from 0 to 1; the rest is the
            divergence from the dense model's predictions.
        rate: the highest learning rate of any block, as a part of the root mean square of each
            tensor, because models differ in the size of their weights and Adam's steps do not
            follow it.
        rate_per_error: the highest learning rate of a block by its error before. The first
            blocks of a model have hardly any, and steps as long as those of others only add some.
        head_rate: the highest learning rate of the last group, whose loss at the head, of few
            tokens and of many words, is far noisier.
        warm_up: steps in which the rate rises; it falls along a cosine to zero.
        tokens: about how many there are in a batch.

    Raises:
        UsageError: there are no steps, no blocks in a group, or no such part of the text.
    """

    steps: int = DEFAULT_STEPS
    blocks: int = DEFAULT_BLOCKS
    text: float = DEFAULT_TEXT
    rate: float = 0.012
    rate_per_error: float = 0.04
    head_rate: float = 0.003
    warm_up: int = 10
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--local-steps must be at least 1, found {self.steps}")
        if self.blocks < 1:
            raise UsageError(f"--local-blocks must be at least 1, found {self.blocks}")
        if not 0 <= self.text <= 1:
            raise UsageError(f"--local-text must be from 0 to 1, found {self.text}")

    def group_of(self, index: int, blocks: int) -> range:
        """Return the blocks that train together with one, of a model with so many."""
        last = max(0, blocks - 2 * self.blocks)
        if index >= last:
            return range(last, blocks)
        first = index - index % self.blocks
        return range(first, min(first + self.blocks, last))

    def highest_rate(self, error: float, *, at_head: bool = False) -> float:
        """Return a block's highest learning rate.

        Args:
            error: of the hidden states that leave it, before training (`token_error`).
            at_head: whether it is in the last group.
        """
        highest = self.head_rate if at_head else self.rate
        return min(highest, self.rate_per_error * error)

    def schedule(self, *, at_head: bool = False) -> list[float]:
        """Return the learning rate of every step, as a part of the highest.

        Args:
            at_head: of the last group.
        """
        steps = 2 * self.steps if at_head else self.steps
        return [
            min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
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


def token_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return |output - target| / |target| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others, or more, and would be all that counts.
    """
    target = target_BTD.float()
    difference = output_BTD.float() - target
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy + _LEAST_SQUARE).sqrt().mean()


def hidden_loss(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the error of each token, averaged, and that of all together, added.

    The second guards the few tokens of huge energy, which attention of other tokens rests on: if
    they lose it, or others gain it, all later blocks break, and one in a thousand hardly shows in
    the first.
    """
    difference = output_BTD.float() - target_BTD.float()
    energy = target_BTD.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    whole = (difference.square().sum() / energy + _LEAST_SQUARE).sqrt()
    return token_error(output_BTD, target_BTD) + whole


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
