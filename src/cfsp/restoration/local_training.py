"""Training of one block alone, towards hidden states that are known.

There is no backward pass through the model: gradients reach from the block's output to its own
parameters.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfsp.calibration.call_recorder import BlockCall
from cfsp.errors import UsageError

DEFAULT_STEPS = 100

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3


@dataclass(frozen=True)
class LocalTraining:
    """How blocks are trained.

    Attributes:
        steps: of Adam, in each block.
        rate: the highest learning rate, as a part of the root mean square of each tensor, because
            models differ in the size of their weights and Adam's steps do not follow it; it rises
            over `warm_up` and falls along a cosine to zero.
        warm_up: steps.
        tokens: about how many there are in a batch.

    Raises:
        UsageError: there are no steps.
    """

    steps: int = DEFAULT_STEPS
    rate: float = 0.1
    warm_up: int = 10
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--local-steps must be at least 1, found {self.steps}")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * cosine


def token_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return |output - target|^2 / |target|^2 of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others and would be all that counts.
    """
    target = target_BTD.float()
    difference = output_BTD.float() - target
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy).mean()


def train_block(
    module: nn.Module,
    call: BlockCall,
    batches: Iterator[tuple[Tensor, Tensor]],
    training: LocalTraining,
    dtype: torch.dtype,
    on_step: Callable[[int], object] = lambda step: None,
) -> bool:
    """Train a block to give the target hidden states.

    Args:
        module: the block, in float32; parameters that require gradients are trained.
        call: how the model calls it, for training.
        batches: input and target hidden states, BTD, without end.
        training: how.
        dtype: what the block will compute in; products are in bfloat16 if this is.
        on_step: is called with the number of each step, from 0.

    Returns:
        Whether every loss was a number; training stops at one that is not.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sizes = [max(_LEAST_SIZE, float(p.detach().square().mean().sqrt())) for p in trained]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained], betas=(0.9, 0.99))
    for step in range(training.steps):
        input_BTD, target_BTD = next(batches)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = training.rate_at(step) * size
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
