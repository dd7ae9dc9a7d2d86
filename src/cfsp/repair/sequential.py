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
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.cut.surgery import PrunedSource
from cfsp.errors import UnsupportedModelError
from cfsp.job import Job
from cfsp.repair.result import BlockRepair, PruningResult, add_step, write_tensors
from cfsp.repair.ridge import LAMBDAS, GramSums, descend, solved
from cfsp.repair.two_streams import BlockVisit, Split, hidden_loss
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock, windows_in_batch
from cfsp.text.windows import Windows, joined

# Of held-out tokens the channels (RK), the block's output and that of the dense block (RD).
Rows = tuple[Tensor, ...]

NAME = "sequential"
GAPS = "gaps"  # the same for blocks at removed ones alone
_IMPOSSIBLE = {
    NAME: "there is no sequential repair of this model, the ridge stays",
    GAPS: "what was removed is not made up for",
}
SHARE_OF_DRIFT = 0.5  # of what a block can take over of the drift (LOG.md, 2026-11-30)

log = logging.getLogger(__name__)


def repair_drift(name: str, job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Fit the down projections of a pruned model, of one block after the other.

    `sequential` fits those of all blocks, `gaps` those of the blocks at removed ones, and of those
    without attention. Blocks of experts alone, or with several dense FFNs, stay as they are; of a
    model whose blocks need more than hidden states all do.
    """
    try:
        return SequentialRepair(name, job, repaired, windows).step()
    except UnsupportedModelError as error:
        log.warning("%s: %s", _IMPOSSIBLE[name], error)
        return repaired


def blocks_at_gaps(count: int, removed: Collection[int]) -> list[int]:
    """Return the blocks of a pruned model that make up for those removed of so many."""
    kept = [block for block in range(count) if block not in removed]
    return [
        index
        for index, block in enumerate(kept)
        if block + 1 in removed or (index == 0 and block > 0)
    ]


class SequentialRepair(Visitor[BlockRepair | None]):
    """Fits the down projections of some blocks of the pruned model, or of all.

    The dense stream passes a block; then the pruned block is fitted, which sees both streams; then
    the pruned stream passes it. Blocks that were removed whole belong to the one before them, or
    else to the first that stays: what that should give is what the dense stream holds after them.
    Of several processes the first solves, with what all have observed.
    """

    waits_for_others = True

    def __init__(self, name: str, job: Job, repaired: PruningResult, windows: Windows) -> None:
        super().__init__(name)
        self._job, self._repaired, plan = job, repaired, repaired.plan
        batch = windows_in_batch(windows, job.runtime.batch_windows)
        self._split = Split(windows, batch, job.work_dir.team)
        self.more_batch_sizes = self._split.batch_sizes
        self.pruned = PrunedSource(job.source, plan, repaired.tensors)
        skeleton = build_skeleton(self.pruned.config, job.runtime.dtype)
        self._modules = blocks_of(skeleton, self.pruned.architecture)
        count = job.source.architecture.block_count
        # Indices in the dense model of the pruned model's blocks, and the end.
        kept = [block for block in range(count) if block not in plan.removed_blocks] + [count]
        self._kept = kept[:-1]
        # The pruned block whose turn it is when the dense stream has passed a block.
        self._turn_after = {after - 1: index for index, after in enumerate(kept[1:])}
        beside = blocks_at_gaps(count, plan.removed_blocks)
        self._at_gaps = {*beside, *map(plan.index_of_block, plan.removed_attentions)}
        every_block = range(self.pruned.architecture.block_count)
        blocks = sorted(self._at_gaps) if name == GAPS else every_block
        found = {block: _last_to_write(self.pruned, block) for block in blocks}
        # Of each block that can be fitted, what is.
        self._unit_of = {block: unit for block, unit in found.items() if unit is not None}
        self._directory = job.work_dir.first_directory_of(name)

    def step(self) -> PruningResult:
        """Return what the step makes of what was there before it: the same where it fits none."""
        if unfitted := self._at_gaps.difference(self._unit_of):
            log.warning(
                f"what was removed is not made up for in {len(unfitted)} of the "
                f"{len(self._at_gaps)} blocks beside it, which have no dense FFN, or several"
            )
        if not self._unit_of:
            return self._repaired
        source, work_dir = self._job.source, self._job.work_dir
        both = joined([self._split.windows] * 2)
        after = pass_blocks(source, both, self, self._job.runtime, work_dir)
        done: list[list[BlockRepair | None]] = [[None] for _ in after]
        for block, index in self._turn_after.items():
            done[self._kept[index]] = [after[block]]
        work_dir.team.gather(None)  # the first has written all
        return add_step(self._repaired, self.name, self._directory, done)

    def may_stop_after(self, block: int) -> bool:
        """Return whether both streams have come as far."""
        return block in self._turn_after

    def visit(self, block: StreamedBlock) -> BlockRepair | None:
        """Let the dense stream pass a block, and the pruned one that whose turn it is."""
        split = self._split
        rows = [slice(batch[0], batch[-1] + 1) for batch in split.batches]
        waiting = [slice(split.count + own.start, split.count + own.stop) for own in rows]
        block.pass_through(block.compute, rows)
        unload(block.module)
        block.tokens_done(split.count * split.seqlen)
        if (index := self._turn_after.get(block.index)) is None:
            return None
        module, kept = self._modules[index], self._kept[index]
        pruned_block = BlockVisit(self.pruned, module, index, kept, block, split)
        result = self._fit(pruned_block)
        block.pass_through(lambda rows, hidden_BTD: pruned_block(hidden_BTD), waiting)
        block.tokens_done(split.count * split.seqlen)
        unload(module)
        return result

    def _fit(self, block: BlockVisit) -> BlockRepair | None:
        """Fit the down projection of a block, if it is one of those; leave the better weights."""
        if (unit := self._unit_of.get(block.index)) is None:
            return None
        down_DK = down_matrix(self.pruned, unit).to(block.device)
        observed = _observe(block, unit, down_DK)
        before, after = block.judge_unchanged(), None
        strength, best_DK = block.split.team.from_first(lambda: _best(down_DK, *observed))
        if best_DK is not None:
            share = 1.0 if block.index in self._at_gaps else SHARE_OF_DRIFT
            new_DK = down_DK.float().lerp(best_DK.to(block.device).float(), share)
            tensors = parameters_with_down(self.pruned, unit, {0: new_DK.to(down_DK.dtype)})
            # Where something follows the down projection, a norm for one, it is not as predicted.
            after = block.accept(before, tensors)
            if after is not None and block.split.team.is_first:
                write_tensors(self._directory, self._kept[block.index], tensors)
        left = before if after is None else after
        return {
            "error_before": before.error,
            "error_after": left.error,
            "kept": after is not None,
            "strength": None if after is None else strength,
            "loss_before": before.loss,
            "loss_after": left.loss,
        }


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


def _observe(block: BlockVisit, unit: Unit, down_DK: Tensor) -> tuple[GramSums, Tensor, list[Rows]]:
    """Let the pruned stream pass the block once.

    Return the sums of x xᵀ and x dᵀ of what it is fitted to, and the held-out tokens of every
    batch: the first process those of all.
    """
    gram, cross_KD = GramSums(), torch.zeros(down_DK.T.shape, device=block.device)
    held_out: list[Rows] = []
    act: list[Tensor] = []
    with observed_activations(block.module, [unit], lambda *rows: act.append(rows[2])):
        for windows in block.split.batches:
            input_BTD, dense_BTD = block.batch(windows)
            output_BTD = block(input_BTD)
            act_BTK = act.pop().view(*output_BTD.shape[:2], -1)
            is_held_out_B = torch.tensor([window in block.split.held_out for window in windows])
            for is_fitted, chosen_B in ((True, ~is_held_out_B), (False, is_held_out_B)):
                if not bool(chosen_B.any()):
                    continue
                act_RK, output_RD, dense_RD = (
                    each[chosen_B.to(block.device)].flatten(0, 1)
                    for each in (act_BTK, output_BTD, dense_BTD)
                )
                if is_fitted:
                    gram.add(act_RK)
                    difference_RD = dense_RD.float() - output_RD.float()
                    cross_KD.addmm_(act_RK.float().T, difference_RD)
                else:
                    held_out.append((act_RK, output_RD, dense_RD))
    if (team := block.split.team).size > 1:
        gram.add_up_at(0, team, len(cross_KD), block.device)
        team.add_up_at(0, [cross_KD])
        own = [[each.cpu() for each in rows] for rows in held_out]
        of_all = chain.from_iterable(team.gather(own, at=0))
        held_out = [tuple(each.to(block.device) for each in rows) for rows in of_all]
    return gram, cross_KD, held_out


def _loss_with(change_DK: Tensor, held_out: Sequence[Rows]) -> float:
    """Return the loss if the down projection changed, and its output went on unchanged."""
    changed = [
        output_RD.float() + act_RK.float() @ change_DK.T for act_RK, output_RD, _ in held_out
    ]
    dense = [dense_RD for _, _, dense_RD in held_out]
    loss = float(hidden_loss(torch.cat(changed), torch.cat(dense)))
    return loss if math.isfinite(loss) else math.inf
