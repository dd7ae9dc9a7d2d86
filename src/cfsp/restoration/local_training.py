"""Training of one block alone, towards hidden states that are known.

There is no backward pass through the model: gradients reach from the block's output to its own
parameters.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfsp.calibration.call_recorder import BlockCall
from cfsp.errors import UsageError

DEFAULT_STEPS = 100

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3
# The root of zero has no gradient, and a block that loses no channel may have no error.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class LocalTraining:
    """How blocks are trained.

    Attributes:
        steps: of Adam, in each block.
        rate: the highest learning rate of any block, as a part of the root mean square of each
            tensor, because models differ in the size of their weights and Adam's steps do not
            follow it.
        rate_per_error: the highest learning rate of a block by its error before. The first
            blocks of a model have hardly any, and steps as long as those of others only add some.
        warm_up: steps in which the rate rises; it falls along a cosine to zero.
        tokens: about how many there are in a batch.

    Raises:
        UsageError: there are no steps.
    """

    steps: int = DEFAULT_STEPS
    rate: float = 0.05
    rate_per_error: float = 0.2
    warm_up: int = 10
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--local-steps must be at least 1, found {self.steps}")

    def rates(self, error: float) -> list[float]:
        """Return the learning rate of every step, from a block's error before (`token_error`)."""
        highest = min(self.rate, self.rate_per_error * error)
        return [
            highest
            * min(1.0, (step + 1) / self.warm_up)
            * 0.5
            * (1 + math.cos(math.pi * step / self.steps))
            for step in range(self.steps)
        ]


def token_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return |output - target| / |target| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others and would be all that counts.
    """
    target = target_BTD.float()
    difference = output_BTD.float() - target
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy + _LEAST_SQUARE).sqrt().mean()


def train_block(
    module: nn.Module,
    call: BlockCall,
    batches: Iterator[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    dtype: torch.dtype,
    on_step: Callable[[int], object] = lambda step: None,
) -> bool:
    """Train a block to give the target hidden states.

    Args:
        module: the block, in float32; parameters that require gradients are trained.
        call: how the model calls it, for training.
        batches: input and target hidden states, BTD, without end.
        rates: learning rate of each step, as a part of the root mean square of each tensor.
        dtype: what the block will compute in; products are in bfloat16 if this is.
        on_step: is called with the number of each step, from 0.

    Returns:
        Whether every loss was a number; training stops at one that is not.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sizes = [max(_LEAST_SIZE, float(p.detach().square().mean().sqrt())) for p in trained]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained], betas=(0.9, 0.99))
    for step, rate in enumerate(rates):
        input_BTD, target_BTD = next(batches)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size
        with torch.autocast(input_BTD.device.type, torch.bfloat16, dtype == torch.bfloat16):
            output_BTD = call(module, input_BTD.float())
        loss = token_error(output_BTD, target_BTD)
        if not math.isfinite(float(loss.detach())):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step(step)
    return True
