"""Sequential repair: each down projection is fitted on the pruned model's own hidden states.

The ridge fits every block to what the dense model computes before it. But a pruned block is entered
by what the pruned blocks before it give, which has drifted. Each down projection takes over what it
can of the difference d between the hidden states of two streams that leave the block:

    W' = W + E[d xᵀ] (E[x xᵀ] + lambda mean(diag) I)^-1        x: channels of the pruned block

So it takes over what attentions have lost too; a block without an FFN is fitted by the output
matrix of its attention. A block before blocks that were removed whole takes over what they did in
the same way, and where the first blocks go, the first one that stays does.

Shapes: B windows in a batch, T tokens, R rows (tokens of a batch), D hidden, K channels of a
pruned block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.architecture.activations import observed_activations
from cfsp.checkpoint.reading import down_matrix, parameters_with_down, units_of_block
from cfsp.repair.gram import GramSums
from cfsp.repair.ridge import LAMBDAS, solved
from cfsp.repair.two_streams import (
    GroupVisit,
    Repaired,
    TwoStreams,
    block_repair,
    error_of_hidden,
    hidden_loss,
)

if TYPE_CHECKING:
    from cfsp.architecture.found import Unit
    from cfsp.cut.surgery import PrunedSource
    from cfsp.job import Job
    from cfsp.repair.result import PruningResult
    from cfsp.text.windows import Windows

NAME = "sequential"
# The same for blocks at removed ones alone.
GAPS = "gaps"

TOKENS_IN_BATCH = 4096

log = logging.getLogger(__name__)


def repair_sequentially(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Fit the down projection of every block of a pruned model, one after the other.

    Blocks have one dense FFN each, or none. Sums are float32, the solve is float64.
    """
    return SequentialRepair(NAME, job, repaired, windows, TOKENS_IN_BATCH).step()


def repair_gaps(job: Job, repaired: PruningResult, windows: Windows) -> PruningResult:
    """Fit the down projections of the blocks at removed ones, and of those without attention.

    The other blocks stay as they are, and so does one that has no dense FFN, or several; where all
    are such there is no step.
    """
    plan = repaired.plan
    beside = blocks_at_gaps(job.source.architecture.block_count, plan.removed_blocks)
    blocks = sorted({*beside, *map(plan.index_of_block, plan.removed_attentions)})
    repair = SequentialRepair(GAPS, job, repaired, windows, TOKENS_IN_BATCH)
    repair.blocks = [block for block in blocks if _last_to_write(repair.pruned, block) is not None]
    if len(repair.blocks) < len(blocks):
        log.warning(
            "what was removed is not made up for in %d of the %d blocks beside it, which have no "
            "dense FFN, or several",
            len(blocks) - len(repair.blocks),
            len(blocks),
        )
    return repair.step() if repair.blocks else repaired


def blocks_at_gaps(count: int, removed: Collection[int]) -> list[int]:
    """Return the blocks of a pruned model that make up for those removed of so many."""
    kept = [block for block in range(count) if block not in removed]
    return [
        index
        for index, block in enumerate(kept)
        if block + 1 in removed or (index == 0 and block > 0)
    ]


class SequentialRepair(TwoStreams):
    """Fits the down projections of some blocks of the pruned model, or of all."""

    blocks: Collection[int] | None = None

    def work(self, group: GroupVisit) -> Repaired | None:
        """Repair the down projection of a block.

        Nothing is done to a block without a dense FFN, or with several, or one that is to stay.
        """
        unit = _last_to_write(self.pruned, group.last)
        if unit is None or (self.blocks is not None and group.last not in self.blocks):
            return None
        seen = _observe(group, self.pruned.units[unit])
        before = group.judge_unchanged(error_of_hidden)
        down_DK = down_matrix(self.pruned, unit).to(group.device)
        if (best := _best_fit(down_DK, seen, before.loss)) is None:
            return block_repair(before, None), {}
        ridge, new_DK = best
        tensors = parameters_with_down(self.pruned, unit, {0: new_DK})
        # Where something follows the down projection, a norm for one, it is not as predicted.
        after = group.accept(before, tensors, error_of_hidden)
        return block_repair(before, after, strength=None if after is None else ridge), tensors


def _last_to_write(pruned: PrunedSource, block: int) -> int | None:
    """Return the unit of a block whose matrix can take over what is lost before the next block.

    It is the only dense FFN, or else the attention. None of a block with several dense FFNs, or
    with experts alone.
    """
    units = units_of_block(pruned, block)
    ffns = [unit for unit in units if pruned.units[unit].part == "ffn"]
    dense = [unit for unit in ffns if not pruned.units[unit].routed]
    if ffns:
        return dense[0] if len(dense) == 1 else None
    return units[-1] if units else None


def _best_fit(down_DK: Tensor, seen: _Seen, least: float) -> tuple[float, Tensor] | None:
    """Return the ridge and the weights with the least loss on held-out tokens.

    None where all lose more than `least`, the loss without a change. The sums are used up.
    """
    best: tuple[float, Tensor] | None = None
    gram_KK, cross_KD = seen.means()
    every_K = torch.arange(len(gram_KK), device=gram_KK.device)
    for ridge in LAMBDAS:
        new_DK = solved(down_DK, gram_KK, every_K, ridge, lambda part: cross_KD[:, part].double())
        if new_DK is None:
            continue
        loss = seen.loss_with((new_DK.double() - down_DK.double()).float())
        if loss >= least and best is not None:
            break
        if loss < least:
            best, least = (ridge, new_DK), loss
    return best


def _observe(group: GroupVisit, unit: Unit) -> _Seen:
    """Let the pruned stream pass the block once; gather sums, and held-out tokens whole."""
    seen = _Seen()
    act: list[Tensor] = []
    (module,) = group.blocks.modules
    with observed_activations(module, [unit], lambda *rows: act.append(rows[2])):
        for windows in group.split.batches:
            batch = group.batch(windows)
            output_BTD = group.blocks(batch.input_BTD)
            act_BTK = act.pop().view(*output_BTD.shape[:2], -1)
            is_held_out_B = torch.tensor([window in group.split.held_out for window in windows])
            for part, add in ((~is_held_out_B, seen.add), (is_held_out_B, seen.add_held_out)):
                if bool(part.any()):
                    chosen_B = part.to(group.device)
                    add(
                        act_BTK[chosen_B].flatten(0, 1),
                        output_BTD[chosen_B].flatten(0, 1),
                        batch.dense_BTD[chosen_B].flatten(0, 1),
                    )
    return seen


class _Seen:
    """E[x xᵀ] and E[x dᵀ] over the tokens that a block is fitted to, and the held-out tokens."""

    def __init__(self) -> None:
        self._gram = GramSums()
        self._cross_KD: Tensor | None = None
        # Of each batch the channels (RK), the block's output and that of the dense block (RD).
        self._held_out: list[tuple[Tensor, ...]] = []

    def add(self, act_RK: Tensor, output_RD: Tensor, dense_RD: Tensor) -> None:
        """Add rows that the block is fitted to."""
        difference_RD = dense_RD.float() - output_RD.float()
        self._gram.add(act_RK)
        if self._cross_KD is None:
            shape = act_RK.shape[1], difference_RD.shape[1]
            self._cross_KD = torch.zeros(shape, device=act_RK.device)
        self._cross_KD.addmm_(act_RK.float().T, difference_RD)

    def add_held_out(self, *rows: Tensor) -> None:
        """Add rows that it is not fitted to."""
        self._held_out.append(rows)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return both means; the sums are used up."""
        assert self._cross_KD is not None
        cross_KD = self._cross_KD.div_(self._gram.tokens)
        return self._gram.mean(), cross_KD

    def loss_with(self, change_DK: Tensor) -> float:
        """Return the loss if the down projection changed, and its output went on unchanged."""
        changed = [
            output_RD.float() + act_RK.float() @ change_DK.T
            for act_RK, output_RD, _dense_RD in self._held_out
        ]
        dense = [dense_RD for _act_RK, _output_RD, dense_RD in self._held_out]
        loss = float(hidden_loss(torch.cat(changed), torch.cat(dense)))
        return loss if math.isfinite(loss) else math.inf
