"""Sequential repair: each down projection is fitted on the pruned model's own hidden states.

The ridge fits every block to what the dense model computes before it. But a pruned block is entered
by what the pruned blocks before it give, which has drifted. Each down projection takes over what it
can of the difference d between the hidden states of two streams that leave the block:

    W' = W + E[d xᵀ] (E[x xᵀ] + lambda mean(diag) I)^-1        x: channels of the pruned block

So it takes over what attention layers have lost too; a block without an FFN is fitted by the output
matrix of its attention. Of W' - W it takes half: the drift is no function of the channels, as what
the ridge makes up for is, and whole steps of all blocks together are too long. A block before
blocks that were removed whole takes over what they did in the same way, but all of it; so do the
first one that stays where the first blocks go, and one whose attention layer went.

Shapes: B windows in a batch, T tokens, R rows (tokens of a batch), D hidden, K channels of a
pruned block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import down_matrix, parameters_with_down
from cfsp.cut.surgery import PrunedSource
from cfsp.errors import UnsupportedModelError
from cfsp.job import Job
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge import LAMBDAS, GramSums, descend, solved
from cfsp.repair.two_streams import (
    Batch,
    GroupVisit,
    Repaired,
    TwoStreams,
    block_repair,
    hidden_loss,
)
from cfsp.streaming.block_stream import TOKENS_IN_BATCH
from cfsp.text.windows import Windows

# Of held-out tokens the channels (RK), the block's output and that of the dense block (RD).
Rows = tuple[Tensor, ...]

NAME = "sequential"
# The same for blocks at removed ones alone.
GAPS = "gaps"
# Of what a block can take over of the drift (LOG.md, 2026-11-30).
SHARE_OF_DRIFT = 0.5

log = logging.getLogger(__name__)


def repair_sequentially(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Fit the down projection of every block of a pruned model, one after the other.

    Blocks that have no dense FFN, or several, stay as they are.

    Raises:
        UnsupportedModelError: blocks need more than hidden states.
    """
    return SequentialRepair(NAME, job, repaired, windows).step()


def repair_where_possible(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Do the same; of a model whose blocks need more than hidden states all stay as they are."""
    try:
        return repair_sequentially(job, repaired, windows)
    except UnsupportedModelError as error:
        log.warning("there is no sequential repair of this model, the ridge stays: %s", error)
        return repaired


def repair_gaps(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Fit the down projections of the blocks at removed ones, and of those without attention.

    The other blocks stay as they are, and so does one that has no dense FFN, or several; where all
    are such there is no step.
    """
    return SequentialRepair(GAPS, job, repaired, windows, at_gaps_alone=True).step()


def blocks_at_gaps(count: int, removed: Collection[int]) -> list[int]:
    """Return the blocks of a pruned model that make up for those removed of so many."""
    kept = [block for block in range(count) if block not in removed]
    return [
        index
        for index, block in enumerate(kept)
        if block + 1 in removed or (index == 0 and block > 0)
    ]


class SequentialRepair(TwoStreams):
    """Fits the down projections of some blocks of the pruned model, or of all.

    Of several processes the first solves, with what all have observed.
    """

    waits_for_others = True

    def __init__(
        self,
        name: str,
        job: Job,
        repaired: PruningResult,
        windows: Windows,
        *,
        at_gaps_alone: bool = False,
    ) -> None:
        super().__init__(name, job, repaired, windows, TOKENS_IN_BATCH)
        plan = repaired.plan
        beside = blocks_at_gaps(job.source.architecture.block_count, plan.removed_blocks)
        self._at_gaps = {*beside, *map(plan.index_of_block, plan.removed_attentions)}
        every_block = range(self.pruned.architecture.block_count)
        blocks = sorted(self._at_gaps) if at_gaps_alone else every_block
        found = {block: _last_to_write(self.pruned, block) for block in blocks}
        # Of each block that can be fitted, what is.
        self._unit_of = {block: unit for block, unit in found.items() if unit is not None}

    def step(self) -> PruningResult:
        """Return what the step makes of what was there before it: the same where it fits none."""
        if unfitted := self._at_gaps.difference(self._unit_of):
            log.warning(
                "what was removed is not made up for in %d of the %d blocks beside it, which have "
                "no dense FFN, or several",
                len(unfitted),
                len(self._at_gaps),
            )
        return super().step() if self._unit_of else self._repaired

    def work(self, group: GroupVisit) -> Repaired | None:
        """Repair the down projection of a block, if it is one of those."""
        if (unit := self._unit_of.get(group.last)) is None:
            return None
        down_DK = down_matrix(self.pruned, unit).to(group.device)
        observed = _observe(group, unit, down_DK)
        before = group.judge_unchanged(hidden_loss)
        strength, best_DK = group.split.team.from_first(lambda: _best(down_DK, *observed))
        if best_DK is None:
            return block_repair(before, None), {}
        share = 1.0 if group.last in self._at_gaps else SHARE_OF_DRIFT
        best_DK = down_DK.float().lerp(best_DK.to(group.device).float(), share).to(down_DK.dtype)
        tensors = parameters_with_down(self.pruned, unit, {0: best_DK})
        # Where something follows the down projection, a norm for one, it is not as predicted.
        after = group.accept(before, tensors, hidden_loss)
        return block_repair(before, after, strength=strength if after else None), tensors


def _last_to_write(pruned: PrunedSource, block: int) -> Unit | None:
    """Return the unit of a block whose matrix can take over what is lost before the next block.

    It is the only dense FFN, or else the attention. None of a block with several dense FFNs, or
    with experts alone.
    """
    units = pruned.architecture.units_of(block)
    ffns = [unit for unit in units if unit.part == "ffn"]
    dense = [unit for unit in ffns if not unit.routed]
    if ffns:
        return dense[0] if len(dense) == 1 else None
    return units[-1] if units else None


def _best(
    down_DK: Tensor, gram: GramSums, cross_KD: Tensor, held_out: Sequence[Rows]
) -> tuple[float | None, Tensor | None]:
    """Return the strength whose down projection loses least, and that; None if it is the old."""
    best: tuple[float | None, Tensor | None] = None, None
    cross_KD.div_(gram.tokens)
    gram_KK = gram.mean()
    every_K = torch.arange(len(gram_KK), device=gram_KK.device)
    least = _loss_with(torch.zeros_like(down_DK).float(), held_out)

    def loss_with(number: int) -> float:
        nonlocal best, least
        ridge = LAMBDAS[number]
        new_DK = solved(down_DK, gram_KK, every_K, ridge, lambda part: cross_KD[:, part].double())
        if new_DK is None:
            return math.inf
        loss = _loss_with((new_DK.double() - down_DK.double()).float(), held_out)
        if loss < least:
            best, least = (ridge, new_DK.cpu()), loss  # it may go to other processes
        return loss

    descend(loss_with, len(LAMBDAS))
    return best


def _observe(group: GroupVisit, unit: Unit, down_DK: Tensor) -> tuple[GramSums, Tensor, list[Rows]]:
    """Let the pruned stream pass the block once.

    Return the sums of x xᵀ and x dᵀ of what it is fitted to, and the held-out tokens of every
    batch: the first process those of all.
    """
    gram, cross_KD = GramSums(), torch.zeros(down_DK.T.shape, device=group.device)
    held_out: list[Rows] = []
    act: list[Tensor] = []
    (module,) = group.blocks.modules
    with observed_activations(module, [unit], lambda *rows: act.append(rows[2])):
        for windows in group.split.batches:
            batch = group.batch(windows)
            output_BTD = group.blocks(batch.input_BTD)
            act_BTK = act.pop().view(*output_BTD.shape[:2], -1)
            is_held_out_B = torch.tensor([window in group.split.held_out for window in windows])
            for is_fitted, chosen_B in ((True, ~is_held_out_B), (False, is_held_out_B)):
                if not bool(chosen_B.any()):
                    continue
                act_RK, output_RD, dense_RD = (
                    each[chosen_B.to(group.device)].flatten(0, 1)
                    for each in (act_BTK, output_BTD, batch.dense_BTD)
                )
                if is_fitted:
                    gram.add(act_RK)
                    difference_RD = dense_RD.float() - output_RD.float()
                    cross_KD.addmm_(act_RK.float().T, difference_RD)
                else:
                    held_out.append((act_RK, output_RD, dense_RD))
    if (team := group.split.team).size > 1:
        gram.add_up_at(0, team, len(cross_KD), group.device)
        team.add_up_at(0, [cross_KD])
        own = [[each.cpu() for each in rows] for rows in held_out]
        of_all = chain.from_iterable(team.gather(own, at=0))
        held_out = [tuple(each.to(group.device) for each in rows) for rows in of_all]
    return gram, cross_KD, held_out


def _loss_with(change_DK: Tensor, held_out: Sequence[Rows]) -> float:
    """Return the loss if the down projection changed, and its output went on unchanged."""
    changed = [
        output_RD.float() + act_RK.float() @ change_DK.T for act_RK, output_RD, _ in held_out
    ]
    dense = [dense_RD for _, _, dense_RD in held_out]
    loss = float(hidden_loss(torch.cat(changed), Batch(torch.empty(0), torch.cat(dense))))
    return loss if math.isfinite(loss) else math.inf
