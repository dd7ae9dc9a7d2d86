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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.together import part_of
from cfsp.cut.surgery import PrunedSource
from cfsp.engine.group_at_work import Batch, GroupAtWork, Loss
from cfsp.engine.judge import hidden_loss
from cfsp.engine.two_streams import TwoStreams, pass_two_streams
from cfsp.repair.head import HeadLoss
from cfsp.repair.local_training import Trained, group_of, highest_rate, schedule, train_blocks
from cfsp.repair.repaired import (
    Repaired,
    RepairedBlock,
    RepairFiles,
    add_step,
    block_repair,
    rejected_blocks,
    write_tensors,
)
from cfsp.repair.together import done_by_first

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.job import Job
    from cfsp.settings import LocalTraining
    from cfsp.text.windows import Windows

NAME = "local"

_MOST_SEEDS = 1 << 63

log = logging.getLogger(__name__)


def repair_locally(job: Job, repaired: Repaired, windows: Windows) -> Repaired:
    """Train all blocks of a pruned model, a few at a time.

    Args:
        job: what is pruned; its blocks have one dense FFN each, or none. Parameters are trained in
            float32.
        repaired: what goes and what was repaired before.
        windows: two or more; some are held out (see `cfsp.text.hold_out`).

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    source, place, training = job.source, job.place, job.settings.local
    pruned = PrunedSource(source, repaired.plan, repaired.tensors)
    blocks = pruned.architecture.block_count
    streams, directory = TwoStreams.of(windows, training.tokens), place.first_directory_of(NAME)
    work = _LocalRepair(
        source, pruned, blocks, training, job.engine.dtype, job.settings.text.seed, directory
    )
    results = pass_two_streams(
        source,
        pruned,
        windows,
        work.repair,
        RepairFiles(directory),
        job.engine,
        place,
        name=NAME,
        streams=streams,
        own=part_of(windows, place.team, streams.batch),
        group_of=partial(group_of, training, blocks=blocks),
        removed=repaired.plan.removed_blocks,
    )
    done = add_step(repaired, NAME, results)
    if rejected := rejected_blocks(done.steps[-1].to_json()):
        log.warning(
            "training was rejected for blocks %s: on held-out windows it did not make them better",
            ", ".join(rejected),
        )
    return done


@dataclass(frozen=True)
class _LocalRepair:
    """What stays the same from group to group."""

    source: WeightSource
    pruned: PrunedSource
    blocks: int
    training: LocalTraining
    dtype: torch.dtype
    seed: int
    directory: Path

    def repair(self, work: GroupAtWork) -> RepairedBlock | None:
        """Train the blocks of a group; leave them with the better of both weights.

        Returns:
            None if none of them has an FFN.
        """
        blocks = range(work.last + 1 - len(work.group.modules), work.last + 1)
        if not any(unit.block in blocks for unit in self.pruned.units):
            return None
        at_head = work.last + 1 == self.blocks
        loss_of: Loss = _hidden_loss
        if at_head:
            loss_of = HeadLoss(self.source, work.device, self.dtype, self.training.text)
        work.gather_held_out()
        before, error_L = work.team.from_first(lambda: (work.judge(loss_of), work.errors()))
        before.check_finite(work.dense_last)
        rates = [highest_rate(self.training, error, at_head=at_head) for error in error_L]
        parts = schedule(self.training, at_head=at_head)
        trained = self._train(work, loss_of, rates, parts)

        def choose() -> RepairedBlock:
            """Leave the group with the better of both weights."""
            if trained is None:  # It diverged.
                work.group.fill(self.dtype, {})
                after = None
            else:
                after = work.accept(before, trained, loss_of)
            file = None
            if trained is not None and after is not None:
                file = write_tensors(self.directory, work.dense_last, trained)
            repair = block_repair(len(rates), before, after, training_steps=len(parts))
            return RepairedBlock(repair, file)

        return done_by_first(work, self.directory, choose)

    def _train(
        self, work: GroupAtWork, loss_of: Loss, rates: list[float], parts: list[float]
    ) -> dict[str, Tensor] | None:
        """Return the trained tensors in their stored dtypes; None if training diverged."""
        # Passes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(mode=False):
            parameters_L = work.group.fill_for_training()
            converged = train_blocks(
                work.group,
                [
                    Trained(list(parameters.values()), rate)
                    for parameters, rate in zip(parameters_L, rates, strict=True)
                ],
                self._batches(work),
                loss_of,
                parts,
                self.dtype,
                lambda step: work.progress((step + 1) / len(parts)),
                work.team,
            )
            if not converged:
                return None
            return {
                self.pruned.origin(name): value.detach().to(self.pruned.parameters[name].dtype)
                for parameters in parameters_L
                for name, value in parameters.items()
            }

    def _batches(self, work: GroupAtWork) -> Iterator[Batch]:
        """Yield batches of random windows without end, every window once before any again."""
        generator = torch.Generator().manual_seed((self.seed + work.last) % _MOST_SEEDS)
        windows, size = work.whole.fitted, work.whole.batch
        left: list[int] = []
        for turn in count():
            while len(left) < size:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[:size], left[size:]
            yield work.batch_of_all(chosen, turn)


def _hidden_loss(output_BTD: Tensor, batch: Batch) -> Tensor:
    return hidden_loss(output_BTD, batch.dense_BTD)
