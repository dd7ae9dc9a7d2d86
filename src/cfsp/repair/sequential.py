"""Sequential repair: down projections are fitted again, on the pruned stream, to the dense one.

The ridge fits every block to what the dense model computes before it. But a pruned block is entered
by what the pruned blocks before it give, which has drifted. Two streams of the same windows pass
block by block, one through the dense model, one through the pruned, and each down projection takes
over what it can of the difference d between the hidden states that leave the block:

    W' = W + E[d xᵀ] (E[x xᵀ] + lambda mean(diag) I)^-1        x: channels of the pruned block

No gradients. In memory are both streams, one dense block (and the next, which is read meanwhile),
one pruned block, and a Gram matrix of its channels.

Shapes: N windows, B windows in a batch, T tokens, R rows (tokens of a batch), D hidden, K channels
of a pruned block, C columns (a slice of D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.engine.activations import observed_activations
from cfsp.engine.block_group import BlockGroup
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.two_streams import TwoStreams
from cfsp.repair.cholesky import SOLVE_COLUMNS, ridge_factor, solve
from cfsp.repair.gram import GramSums
from cfsp.repair.local_training import hidden_loss, token_error
from cfsp.repair.reconstructed import (
    HeldOut,
    ReconstructedBlocks,
    ReconstructedFiles,
    write_trained,
)
from cfsp.repair.ridge import LAMBDAS
from cfsp.text.hold_out import HELD_OUT_WINDOWS

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.cut.surgery import PrunedSource
    from cfsp.engine.workplace import Workplace

PASS_NAME = "sequential"

_TOKENS = 4096


def fit_again(
    source: WeightSource,
    pruned: PrunedSource,
    tokens_NT: Tensor,
    place: Workplace,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[ReconstructedBlocks | None]:
    """Fit the down projection of every block of a pruned model again, one after the other.

    Args:
        source: the dense model; its blocks have one FFN each.
        pruned: what surgery would make of it, earlier repairs included.
        tokens_NT: two windows or more; every eighth batch is held out.
        place: where new tensors go, until they are in the new checkpoint.
        device: where to compute.
        dtype: what blocks compute in; sums are float32, the solve is float64.

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    streams = TwoStreams.of(tokens_NT, max(1, _TOKENS // tokens_NT.shape[1]))
    skeleton = build_skeleton(pruned.config, dtype)
    modules = blocks_of(skeleton, source.family)
    work = _Sequential(pruned, modules, streams, dtype, place.directory_of(PASS_NAME))
    return pass_blocks(
        source,
        streams.doubled(tokens_NT),
        work.visit,
        ReconstructedFiles(),
        name=PASS_NAME,
        device=device,
        dtype=dtype,
        batch_windows=streams.batch,
        place=place,
    )


@dataclass(frozen=True)
class _Sequential:
    """What stays the same from block to block."""

    pruned: PrunedSource
    modules: nn.ModuleList
    streams: TwoStreams
    dtype: torch.dtype
    directory: Path

    def visit(self, block: StreamedBlock) -> ReconstructedBlocks:
        """Let both streams pass one block, the pruned one after its repair."""
        call = block.call(block.index, self.streams.batch)
        block.pass_through(partial(call, block.module), self.streams.dense)
        unload(block.module)
        block.tokens_done(self.streams.tokens // 2)
        module = self.modules[block.index]
        group = BlockGroup(self.pruned, [module], block.index, [call], block.device)
        group.fill(self.dtype, {})
        result = self._refit(block, module, group)
        block.pass_through(group, map(self.streams.pruned, self.streams.dense))
        block.tokens_done(self.streams.tokens // 2)
        block.hidden.turn()
        group.unload()
        return result

    def _refit(
        self, block: StreamedBlock, module: nn.Module, group: BlockGroup
    ) -> ReconstructedBlocks:
        """Solve for the down projection; leave the block with the better of both weights."""
        family = self.pruned.family
        name = family.weight_name(block.index, family.down, 0)
        sums, held_out = self._observe(block, module, group)
        before = held_out.unchanged()
        before.check_finite(block.index)
        stored = self.pruned.read(name)
        down_DK = family.turned(stored).to(block.device)
        best: tuple[float, Tensor] | None = None
        least = before.loss
        gram_KK, cross_KD = sums.means()
        for ridge in LAMBDAS:
            change_DK = _solve(gram_KK, cross_KD, ridge)
            if change_DK is None:
                continue
            new_DK = (down_DK.double() + change_DK).to(stored.dtype)
            loss = held_out.loss_with((new_DK.double() - down_DK.double()).float())
            if loss >= least and best is not None:
                break
            if loss < least:
                best, least = (ridge, new_DK), loss
        after, file, strength = None, None, None
        if best is not None:
            ridge, new_DK = best
            refitted = {name: family.turned(new_DK).contiguous()}
            group.fill(self.dtype, refitted)
            # Where something follows the down projection, a norm for one, it is not as predicted.
            found = self._measured(block, group)
            if found.is_finite and found.loss < before.loss:
                after, strength = found, ridge
                file = write_trained(self.directory, block.index, refitted)
            else:
                group.fill(self.dtype, {})
        return ReconstructedBlocks(1, before, after or before, 0, file, strength)

    def _observe(
        self, block: StreamedBlock, module: nn.Module, group: BlockGroup
    ) -> tuple[_Sums, _HeldOutRows]:
        sums, held_out_rows = _Sums(), _HeldOutRows()
        held_out = {batch.start for batch in self.streams.held_out}
        seen: list[Tensor] = []
        with observed_activations(
            module, self.pruned.family, lambda ffn, act_RF, token_R: seen.append(act_RF)
        ):
            for batch in self.streams.dense:
                seen.clear()
                input_BTD = block.hidden.read(self.streams.pruned(batch)).to(block.device)
                output_RD = group(input_BTD).flatten(0, 1)
                target_RD = block.hidden.read_written(batch).to(block.device).flatten(0, 1)
                if batch.start not in held_out:
                    sums.add(seen[0], target_RD.float() - output_RD.float())
                elif held_out_rows.rows < HELD_OUT_WINDOWS * self.streams.seqlen:
                    held_out_rows.add(seen[0], output_RD, target_RD)
        return sums, held_out_rows

    def _measured(self, block: StreamedBlock, group: BlockGroup) -> HeldOut:
        rows = _HeldOutRows()
        for batch in self.streams.held_out:
            if rows.rows >= HELD_OUT_WINDOWS * self.streams.seqlen:
                break
            output_BTD = group(block.hidden.read(self.streams.pruned(batch)).to(block.device))
            target_BTD = block.hidden.read_written(batch).to(block.device)
            none_RK = output_BTD.new_empty(output_BTD.shape[:2].numel(), 0)
            rows.add(none_RK, output_BTD.flatten(0, 1), target_BTD.flatten(0, 1))
        return rows.unchanged()


class _Sums:
    """E[x xᵀ] and E[x dᵀ] over the tokens that a block is fitted to."""

    def __init__(self) -> None:
        self._gram = GramSums()
        self._cross_KD: Tensor | None = None

    def add(self, act_RK: Tensor, difference_RD: Tensor) -> None:
        """Add rows of channels and of what is missing in the block's output."""
        self._gram.add(act_RK)
        if self._cross_KD is None:
            shape = act_RK.shape[1], difference_RD.shape[1]
            self._cross_KD = torch.zeros(shape, device=act_RK.device)
        self._cross_KD.addmm_(act_RK.float().T, difference_RD)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return both; the sums are used up."""
        assert self._cross_KD is not None
        cross_KD = self._cross_KD.div_(self._gram.tokens)
        return self._gram.mean(), cross_KD


class _HeldOutRows:
    """Some tokens that a block is not fitted to."""

    def __init__(self) -> None:
        self.rows = 0
        self._act: list[Tensor] = []
        self._output: list[Tensor] = []
        self._target: list[Tensor] = []

    def add(self, act_RK: Tensor, output_RD: Tensor, target_RD: Tensor) -> None:
        """Add rows of channels, of the block's output and of the dense block's."""
        self.rows += len(output_RD)
        self._act.append(act_RK)
        self._output.append(output_RD)
        self._target.append(target_RD)

    def unchanged(self) -> HeldOut:
        """Return how far the outputs are from the dense ones."""
        output_RD, target_RD = torch.cat(self._output), torch.cat(self._target)
        return HeldOut(
            float(token_error(output_RD, target_RD)), float(hidden_loss(output_RD, target_RD))
        )

    def loss_with(self, change_DK: Tensor) -> float:
        """Return the loss if the down projection changed, and its output went on unchanged."""
        changed = [
            output_RD.float() + act_RK.float() @ change_DK.T
            for output_RD, act_RK in zip(self._output, self._act, strict=True)
        ]
        loss = float(hidden_loss(torch.cat(changed), torch.cat(self._target)))
        return loss if math.isfinite(loss) else math.inf


def _solve(gram_KK: Tensor, cross_KD: Tensor, ridge: float) -> Tensor | None:
    """Return the change of the down projection; None if the matrix is not positive definite."""
    every_K = torch.arange(len(gram_KK), device=gram_KK.device)
    system = ridge_factor(gram_KK, every_K, ridge)
    if system is None:
        return None
    columns = [part_KC.double() for part_KC in torch.split(cross_KD, SOLVE_COLUMNS, dim=1)]
    for column_KC in columns:
        solve(system, column_KC)
    return torch.cat(columns, dim=1).T
