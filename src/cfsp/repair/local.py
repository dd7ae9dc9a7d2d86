"""Local repair: pruned blocks learn to give the dense model's hidden states.

A few consecutive blocks train together. They see what the pruned blocks before them give, and learn
what the dense stream holds after the last of them, so that they also correct the drift that they
inherit. The model's last blocks learn what the dense model predicts. There is no backward pass
through more blocks than these.

Shapes: B windows in a batch, T tokens, P positions in a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import WeightSource
from cfsp.job import Job
from cfsp.repair.result import PruningResult, rejected_blocks
from cfsp.repair.two_streams import (
    Batch,
    GroupVisit,
    Loss,
    Repaired,
    TwoStreams,
    block_repair,
    hidden_loss,
)
from cfsp.streaming.decoder_end import Head
from cfsp.streaming.runtime import Runtime
from cfsp.text.windows import Windows

# Biases of zeros could never move.
_LEAST_SIZE = 1e-3
_MOST_SEEDS = 1 << 63
# Predictions that count in a batch, at least. The head is a large part of a small model's
# arithmetic.
_PREDICTIONS = 256

# Consecutive ones that train together, twice as many at the model's end.
BLOCKS = 3
# Highest learning rates, as parts of the root mean square of each tensor, because models differ in
# the size of their weights and Adam's steps do not follow it: of any block, of a block by its error
# before (the first have hardly any, and as long steps as others' only add some), and of the last
# group, whose loss at the head, of few tokens and many words, is far noisier.
RATE, RATE_PER_ERROR, HEAD_RATE = 0.012, 0.04, 0.003
# Steps in which the rate rises; it falls along a cosine to zero.
WARM_UP = 10
# About so many are in a batch.
_TOKENS = 2048

NAME = "local"

log = logging.getLogger(__name__)


def group_of(index: int, blocks: int) -> range:
    """Return the blocks that train together with one, of a model with so many."""
    last = max(0, blocks - 2 * BLOCKS)
    if index >= last:
        return range(last, blocks)
    first = index - index % BLOCKS
    return range(first, min(first + BLOCKS, last))


def highest_rate(error: float, *, at_head: bool) -> float:
    """Return a block's highest learning rate, from the `token_error` of what leaves it before."""
    return min(HEAD_RATE if at_head else RATE, RATE_PER_ERROR * error)


def schedule(steps: int) -> list[float]:
    """Return the learning rate of every step, as a part of the highest."""
    return [
        min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for step in range(steps)
    ]


def train_blocks(
    compute: Callable[[Tensor], Tensor],
    trained: Iterable[tuple[Iterable[nn.Parameter], float]],
    steps: Iterable[tuple[float, Batch]],
    loss_of: Loss,
    dtype: torch.dtype,
    on_step: Callable[[], object] = lambda: None,
) -> bool:
    """Train blocks to give the target hidden states, or what a loss makes of them.

    `trained` are parameters of one block with their highest learning rate, as a part of the root
    mean square that each has before any step; a step is a part of that rate, and a batch. Weights
    are float32, products in bfloat16 where the blocks will compute in that. Return whether every
    loss was a number; training stops at one that is not.
    """

    def size(parameter: nn.Parameter) -> float:
        return max(_LEAST_SIZE, float(parameter.detach().square().mean().sqrt()))

    groups = [
        {"params": [parameter], "highest": rate * size(parameter)}
        for parameters, rate in trained
        for parameter in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for part, batch in steps:
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
        on_step()
    return True


def repair_locally(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Train all blocks of a pruned model, a few at a time, in float32."""
    done = _LocalRepair(NAME, job, repaired, windows, _TOKENS).step()
    if rejected := rejected_blocks(done.steps[-1]):
        log.warning(
            "training was rejected for blocks %s: on held-out windows it did not make them better",
            ", ".join(rejected),
        )
    return done


class _LocalRepair(TwoStreams):
    def group_of(self, block: int) -> range:
        return group_of(block, self.pruned.architecture.block_count)

    def work(self, group: GroupVisit) -> Repaired | None:
        """Train the blocks of a group, if any has an FFN."""
        if not any(unit.block in group.blocks.indices for unit in self.pruned.units):
            return None
        at_head = group.last + 1 == self.pruned.architecture.block_count
        loss_of: Loss = hidden_loss
        if at_head:
            loss_of = HeadLoss(self._job.source, self.runtime)
        before = group.judge_unchanged(loss_of)
        rates = [highest_rate(error, at_head=at_head) for error in before.error_L]
        parts = schedule(self._job.settings.local.steps * (2 if at_head else 1))
        after, trained = None, self._train(group, loss_of, rates, parts)
        if trained is None:  # It diverged.
            group.blocks.fill()
        else:
            after = group.accept(before, trained, loss_of)
        return block_repair(before, after, training_steps=len(parts)), trained or {}

    def _train(
        self, group: GroupVisit, loss_of: Loss, rates: list[float], parts: list[float]
    ) -> dict[str, Tensor] | None:
        """Return the trained tensors in their stored dtypes; None if training diverged."""
        done = count(1)
        # Passes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(mode=False):
            parameters_L = group.blocks.fill_for_training()
            converged = train_blocks(
                group.blocks,
                [(own.values(), rate) for own, rate in zip(parameters_L, rates, strict=True)],
                zip(parts, self._batches(group), strict=False),
                loss_of,
                self.runtime.dtype,
                lambda: group.progress(next(done) / len(parts)),
            )
            if not converged:
                return None
            return {
                self.pruned.origin(name): value.detach().to(self.pruned.parameters[name].dtype)
                for parameters in parameters_L
                for name, value in parameters.items()
            }

    def _batches(self, group: GroupVisit) -> Iterator[Batch]:
        """Yield batches of random windows without end, every window once before any again."""
        seed = (self._job.settings.text.seed + group.last) % _MOST_SEEDS
        generator = torch.Generator().manual_seed(seed)
        windows, size = group.split.fitted, group.split.batch
        left: list[int] = []
        for turn in count():
            while len(left) < size:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[:size], left[size:]
            yield group.batch(chosen, turn)


class HeadLoss:
    """How far predictions from the last block's hidden states are from the dense model's."""

    def __init__(self, source: WeightSource, runtime: Runtime) -> None:
        self._head = Head(source, runtime.device, runtime.dtype)

    def __call__(self, output_BTD: Tensor, batch: Batch) -> Tensor:
        """Return KL(dense || output) of the next token, the mean over some positions, in nats.

        Neighbours are alike, so that every batch is judged at a few positions, others in each
        turn. Gradients reach the hidden states.
        """
        windows, length = output_BTD.shape[:2]
        # What follows the last token is not known.
        stride = min(length - 1, max(1, windows * length // _PREDICTIONS))
        first = batch.turn % stride
        position_P = torch.arange(first, length - 1, stride, device=output_BTD.device)
        log_probability_BPV = self._log_probabilities(output_BTD, position_P)
        with torch.no_grad():
            expected_BPV = self._log_probabilities(batch.dense_BTD, position_P)
        divergence_BP = torch.linalg.vecdot(expected_BPV.exp(), expected_BPV - log_probability_BPV)
        loss: Tensor = divergence_BP.mean()
        return loss

    def _log_probabilities(self, hidden_BTD: Tensor, position_P: Tensor) -> Tensor:
        hidden_BPD = hidden_BTD[:, position_P]
        logits_RV = self._head.logits(hidden_BPD.flatten(0, 1))  # all positions of the batch
        return logits_RV.float().log_softmax(-1).view(*hidden_BPD.shape[:2], -1)
