"""Local repair: pruned blocks learn to give the dense model's hidden states.

A few consecutive blocks train together. They see what the pruned blocks before them give, and learn
what the dense stream holds after the last of them, so that they also correct the drift that they
inherit. The model's last blocks learn what the dense model predicts and, if asked to, the text
itself. In memory are both streams, one dense block (and the next, which is read meanwhile) and the
pruned blocks that train, with their optimizer. There is no backward pass through more blocks than
these.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.repair.head import HeadLoss
from cfsp.repair.local_training import Trained, group_of, highest_rate, schedule, train_blocks
from cfsp.repair.result import BlockRepair, PruningResult, block_repair, rejected_blocks
from cfsp.repair.stream_repair import StreamRepair, error_of_hidden
from cfsp.streaming.group_visit import Batch, GroupVisit, Loss

if TYPE_CHECKING:
    from cfsp.job import Job
    from cfsp.text.windows import Windows

NAME = "local"

_MOST_SEEDS = 1 << 63

log = logging.getLogger(__name__)


def repair_locally(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Train all blocks of a pruned model, a few at a time.

    Args:
        job: what is pruned; its blocks have one dense FFN each, or none. Parameters are trained in
            float32.
        repaired: what goes and what was repaired before.
        windows: two or more; some are held out (see `cfsp.text.windows`).

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the work directory holds unfinished work of something else.
    """
    done = _LocalRepair(job, repaired, windows).step()
    if rejected := rejected_blocks(done.steps[-1].to_json()):
        log.warning(
            "training was rejected for blocks %s: on held-out windows it did not make them better",
            ", ".join(rejected),
        )
    return done


class _LocalRepair(StreamRepair):
    def __init__(self, job: Job, repaired: PruningResult, windows: Windows) -> None:
        self._training, self._seed = job.settings.local, job.settings.text.seed
        super().__init__(NAME, job, repaired, windows, self._training.tokens)

    def group_of(self, block: int) -> range:
        """Return the blocks that train together with one."""
        return group_of(self._training, block, self.pruned.architecture.block_count)

    def work(self, group: GroupVisit) -> BlockRepair | None:
        """Train the blocks of a group; leave them with the better of both weights.

        Returns:
            None if none of them has an FFN.
        """
        if not any(unit.block in group.blocks.indices for unit in self.pruned.units):
            return None
        at_head = group.last + 1 == self.pruned.architecture.block_count
        loss_of: Loss = error_of_hidden
        if at_head:
            loss_of = HeadLoss(self.source, self.runtime, self._training.text)
        group.gather_held_out()
        before, error_L = group.team.from_first(lambda: (group.judge(loss_of), group.errors()))
        before.check_finite(group.dense_last)
        rates = [highest_rate(self._training, error, at_head=at_head) for error in error_L]
        parts = schedule(self._training, at_head=at_head)
        trained = self._train(group, loss_of, rates, parts)

        def choose() -> tuple[BlockRepair, Mapping[str, Tensor]]:
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
        # Passes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(mode=False):
            parameters_L = group.blocks.fill_for_training()
            converged = train_blocks(
                group.blocks,
                [
                    Trained(list(parameters.values()), rate)
                    for parameters, rate in zip(parameters_L, rates, strict=True)
                ],
                self._batches(group),
                loss_of,
                parts,
                self.runtime.dtype,
                lambda step: group.progress((step + 1) / len(parts)),
                group.team,
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
        generator = torch.Generator().manual_seed((self._seed + group.last) % _MOST_SEEDS)
        windows, size = group.streams.fitted, group.streams.batch
        left: list[int] = []
        for turn in count():
            while len(left) < size:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[:size], left[size:]
            yield group.batch_of_all(chosen, turn)
