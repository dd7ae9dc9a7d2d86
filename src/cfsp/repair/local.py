"""Local repair: pruned blocks learn to give the dense model's hidden states.

A few consecutive blocks train together. They see what the pruned blocks before them give, and learn
what the dense stream holds after the last of them, so that they also correct the drift that they
inherit. The model's last blocks learn what the dense model predicts and, if asked to, the text
itself. There is no backward pass through more blocks than these.

Shapes: B windows in a batch, T tokens, P positions in a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.repair.local_training import group_of, highest_rate, schedule, train_blocks
from cfsp.repair.result import BlockRepair, PruningResult, block_repair, rejected_blocks
from cfsp.repair.stream_repair import Repaired, StreamRepair, error_of_hidden
from cfsp.streaming.decoder_end import Head
from cfsp.streaming.two_streams import Batch, GroupVisit, Loss

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.job import Job
    from cfsp.streaming.runtime import Runtime
    from cfsp.text.windows import Windows

NAME = "local"

_MOST_SEEDS = 1 << 63
# Predictions that count in a batch, at least. The head is a large part of a small model's
# arithmetic.
_PREDICTIONS = 256

log = logging.getLogger(__name__)


def repair_locally(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Train all blocks of a pruned model, a few at a time, in float32.

    Blocks have one dense FFN each, or none.
    """
    done = _LocalRepair(NAME, job, repaired, windows, job.settings.local.tokens).step()
    if rejected := rejected_blocks(done.steps[-1].to_json()):
        log.warning(
            "training was rejected for blocks %s: on held-out windows it did not make them better",
            ", ".join(rejected),
        )
    return done


class _LocalRepair(StreamRepair):
    def group_of(self, block: int) -> range:
        """Return the blocks that train together with one."""
        return group_of(self._job.settings.local, block, self.pruned.architecture.block_count)

    def work(self, group: GroupVisit) -> BlockRepair | None:
        """Train the blocks of a group, if any has an FFN; leave them with the better weights."""
        if not any(unit.block in group.blocks.indices for unit in self.pruned.units):
            return None
        training = self._job.settings.local
        at_head = group.last + 1 == self.pruned.architecture.block_count
        loss_of: Loss = error_of_hidden
        if at_head:
            loss_of = HeadLoss(self._job.source, self.runtime, training.text)
        group.gather_held_out()
        before, error_L = group.team.from_first(lambda: (group.judge(loss_of), group.errors()))
        before.check_finite(group.dense_last)
        rates = [highest_rate(training, error, at_head=at_head) for error in error_L]
        parts = schedule(training, at_head=at_head)
        trained = self._train(group, loss_of, rates, parts)

        def choose() -> Repaired:
            """Leave the group with the better of both weights."""
            if trained is None:  # It diverged.
                group.blocks.fill()
                after = None
            else:
                after = group.accept(before, trained, loss_of)
            repair = block_repair(len(rates), before, after, training_steps=len(parts))
            return repair, trained or {}

        return self.done_by_first(group, choose)

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
                [(list(parameters_L[i].values()), rate) for i, rate in enumerate(rates)],
                zip(parts, self._batches(group), strict=False),
                loss_of,
                self.runtime.dtype,
                group.team,
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
        windows, size = group.streams.fitted, group.streams.batch
        left: list[int] = []
        for turn in count():
            while len(left) < size:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[:size], left[size:]
            yield group.batch_of_all(chosen, turn)


class HeadLoss:
    """How far predictions from what leaves the last block are from the dense model's, and the text.

    The head computes in the runtime's dtype, the loss is in float32; `text` is the part of the text
    in it, from 0 to 1.
    """

    def __init__(self, source: WeightSource, runtime: Runtime, text: float) -> None:
        self._head = Head(source, runtime.device, runtime.dtype)
        self._text = text

    def __call__(self, output_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the next token's predictions, the mean over some positions, in nats.

            (1 - text) KL(dense || output) - text log p(next token)

        Neighbours are alike, so that every batch is judged at a few positions, others in each
        turn. Gradients reach the hidden states.
        """
        windows, length = batch.tokens_BT.shape
        # What follows the last token is not known.
        stride = min(length - 1, max(1, windows * length // _PREDICTIONS))
        first = batch.turn % stride
        position_P = torch.arange(first, length - 1, stride, device=output_BTD.device)
        log_probability_BPV = self._log_probabilities(output_BTD, position_P)
        with torch.no_grad():
            expected_BPV = self._log_probabilities(batch.dense_BTD, position_P)
        divergence_BP = torch.linalg.vecdot(expected_BPV.exp(), expected_BPV - log_probability_BPV)
        next_BP1 = batch.tokens_BT[:, position_P + 1].unsqueeze(-1)
        text_BP = -log_probability_BPV.gather(-1, next_BP1).squeeze(-1)
        loss_BP = (1 - self._text) * divergence_BP + self._text * text_BP
        loss: Tensor = loss_BP.mean()
        return loss

    def _log_probabilities(self, hidden_BTD: Tensor, position_P: Tensor) -> Tensor:
        hidden_BPD = hidden_BTD[:, position_P]
        logits_RV = self._head.logits(hidden_BPD.flatten(0, 1))  # all positions of the batch
        return logits_RV.float().log_softmax(-1).view(*hidden_BPD.shape[:2], -1)
