"""Local reconstruction: pruned blocks learn to give the dense model's hidden states.

Two streams of the same windows pass block by block: one through the dense model, one through the
pruned. A few consecutive blocks train together. They see what the pruned blocks before them
give, and their target is what the dense stream holds after the last of them, so that they also
correct the drift that they inherit. After the model's last block the target is what the dense
model predicts, and the text itself. In memory are both streams, one dense block (and the next,
which is read meanwhile) and the pruned blocks that train, with their optimizer. There is no
backward pass through more blocks than these.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.engine.block_group import BlockGroup
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.two_streams import TwoStreams
from cfsp.errors import TextError, UnsupportedModelError
from cfsp.repair.head import HeadLoss
from cfsp.repair.local_training import (
    Batch,
    LocalTraining,
    Loss,
    Trained,
    hidden_loss,
    token_error,
    train_blocks,
)
from cfsp.repair.reconstructed import (
    HeldOut,
    ReconstructedBlocks,
    ReconstructedFiles,
    say_what_was_left_alone,
    write_trained,
)

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.cut.surgery import PrunedSource
    from cfsp.engine.workplace import Workplace

PASS_NAME = "reconstruct"

_MOST_SEEDS = 1 << 63


def check_can_reconstruct(source: WeightSource) -> None:
    """Check that a model's blocks can be trained alone.

    Raises:
        UnsupportedModelError: they are mixtures of experts.
    """
    if source.family.experts is not None:
        raise UnsupportedModelError(
            "--restore sequential and local are for blocks with one FFN, and those of "
            f"{source.label} ({source.family.model_type}) have experts, each of which sees few "
            "tokens; use --restore ridge"
        )


def reconstruct_blocks(
    source: WeightSource,
    pruned: PrunedSource,
    tokens_NT: Tensor,
    place: Workplace,
    training: LocalTraining,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> list[ReconstructedBlocks | None]:
    """Train all blocks of a pruned model, a few at a time.

    Args:
        source: the dense model.
        pruned: what surgery would make of it, earlier repairs included.
        tokens_NT: windows; every eighth batch is held out.
        place: where trained tensors go, until they are in the new checkpoint.
        training: how blocks are trained.
        device: where to compute.
        dtype: what blocks compute in; parameters are trained in float32.
        seed: of the order in which windows are trained on.

    Returns:
        What became of the blocks that trained together, at the last of them; None at the others.

    Raises:
        UnsupportedModelError: the model is a mixture of experts.
        TextError: fewer than two windows: none can be held out.
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    check_can_reconstruct(source)
    if len(tokens_NT) < 2:
        raise TextError(
            "reconstruction needs at least 2 windows, one of them held out, found 1; "
            "give more --samples, or --restore none"
        )
    streams = TwoStreams.of(tokens_NT, max(1, training.tokens // tokens_NT.shape[1]))
    skeleton = build_skeleton(pruned.config, dtype)
    work = _Reconstruction(
        source,
        pruned,
        blocks_of(skeleton, source.family),
        tokens_NT,
        streams,
        training,
        dtype,
        seed,
        place.directory_of(PASS_NAME),
    )
    blocks = pass_blocks(
        source,
        streams.doubled(tokens_NT),
        work.visit,
        ReconstructedFiles(),
        name=PASS_NAME,
        device=device,
        dtype=dtype,
        batch_windows=streams.batch,
        place=place,
        may_stop_after=lambda block: block == training.group_of(block, len(work.modules))[-1],
    )
    say_what_was_left_alone(blocks)
    return blocks


@dataclass(frozen=True)
class _Reconstruction:
    """What stays the same from block to block, and what a group's blocks leave to the last.

    Attributes:
        passed: what the dense stream's first held-out batch was after each block of the group.
    """

    source: WeightSource
    pruned: PrunedSource
    modules: nn.ModuleList
    tokens_NT: Tensor
    streams: TwoStreams
    training: LocalTraining
    dtype: torch.dtype
    seed: int
    directory: Path
    passed: list[Tensor] = field(default_factory=list)

    def visit(self, block: StreamedBlock) -> ReconstructedBlocks | None:
        """Let the dense stream pass a block, and train if it is the last of its group."""
        dense = block.call(block.index, self.streams.batch)
        block.pass_through(partial(dense, block.module), self.streams.dense)
        unload(block.module)
        self.passed.append(block.hidden.read_written(self.streams.held_out[0]).clone())
        indices = self.training.group_of(block.index, len(self.modules))
        if block.index == indices[-1]:
            group = BlockGroup(
                self.pruned,
                [self.modules[index] for index in indices],
                indices[0],
                [block.call(index, self.streams.batch) for index in indices],
                block.device,
            )
            result = self._reconstruct(block, group, len(indices))
            block.pass_through(group, map(self.streams.pruned, self.streams.dense))
            group.unload()
            self.passed.clear()
        else:
            result = None
            # It waits before the group.
            block.pass_through(lambda hidden: hidden, map(self.streams.pruned, self.streams.dense))
        block.hidden.turn()
        return result

    def _reconstruct(
        self, block: StreamedBlock, group: BlockGroup, count: int
    ) -> ReconstructedBlocks:
        """Train the blocks of a group; leave them with the better of both weights."""
        at_head = block.index + 1 == len(self.modules)
        loss_of: Loss = _hidden_loss
        if at_head:
            loss_of = HeadLoss(self.source, block.device, self.dtype, self.training.text)
        group.fill(self.dtype, {})
        before = self._held_out(block, group, loss_of)
        before.check_finite(block.index)
        rates = [
            self.training.highest_rate(drift, at_head=at_head)
            for drift in self._drifts(block, group)
        ]
        schedule = self.training.schedule(at_head=at_head)
        trained = self._train(block, group, loss_of, rates, schedule)
        after, file = None, None
        if trained is not None:
            group.fill(self.dtype, trained)
            found = self._held_out(block, group, loss_of)
            after = found if found.is_finite else None
        if trained is not None and after is not None and after.loss < before.loss:
            file = write_trained(self.directory, block.index, trained)
        else:
            group.fill(self.dtype, {})
        return ReconstructedBlocks(count, before, after, len(schedule), file)

    def _held_out(self, block: StreamedBlock, group: BlockGroup, loss_of: Loss) -> HeldOut:
        errors, losses = [], []
        for turn, windows in enumerate(self.streams.held_out):
            batch = self._batch(block, [windows], turn)
            output_BTD = group(batch.input_BTD)
            errors.append(float(token_error(output_BTD, batch.target_BTD)))
            losses.append(float(loss_of(output_BTD, batch)))
        return HeldOut(fmean(errors), fmean(losses))

    def _drifts(self, block: StreamedBlock, group: BlockGroup) -> list[float]:
        """Return how far every block of the group is from the dense stream before training."""
        batch = self.streams.pruned(self.streams.held_out[0])
        outputs = group.outputs(block.hidden.read(batch).to(block.device))
        return [
            float(token_error(output_BTD, target_BTD.to(block.device)))
            for output_BTD, target_BTD in zip(outputs, self.passed, strict=True)
        ]

    def _train(
        self,
        block: StreamedBlock,
        group: BlockGroup,
        loss_of: Loss,
        rates: Sequence[float],
        schedule: Sequence[float],
    ) -> dict[str, Tensor] | None:
        """Return the trained tensors in their stored dtypes; None if training diverged."""
        steps, tokens = len(schedule), self.streams.tokens * len(rates)

        def on_step(step: int) -> None:
            block.tokens_done(tokens * (step + 1) // steps - tokens * step // steps)

        # Passes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(mode=False):
            parameters_L = group.fill_for_training()
            converged = train_blocks(
                group,
                [
                    Trained(list(parameters.values()), rate)
                    for parameters, rate in zip(parameters_L, rates, strict=True)
                ],
                self._batches(block),
                loss_of,
                schedule,
                self.dtype,
                on_step,
            )
            if not converged:
                return None
            return {
                name: parameter.detach().to(self.pruned.specs[name].dtype)
                for parameters in parameters_L
                for name, parameter in parameters.items()
            }

    def _batches(self, block: StreamedBlock) -> Iterator[Batch]:
        """Yield batches of random windows without end, every window once before any again."""
        generator = torch.Generator().manual_seed((self.seed + block.index) % _MOST_SEEDS)
        windows = self.streams.trained
        left: list[int] = []
        for turn in count():
            while len(left) < self.streams.batch:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[: self.streams.batch], left[self.streams.batch :]
            yield self._batch(block, [slice(i, i + 1) for i in chosen], turn)

    def _batch(self, block: StreamedBlock, windows: Sequence[slice], turn: int) -> Batch:
        """Return some windows of both streams before and after a group of blocks."""
        hidden, device = block.hidden, block.device
        return Batch(
            torch.cat([hidden.read(self.streams.pruned(part)) for part in windows]).to(device),
            torch.cat([hidden.read_written(part) for part in windows]).to(device),
            torch.cat([self.tokens_NT[part] for part in windows]).to(device),
            turn,
        )


def _hidden_loss(output_BTD: Tensor, batch: Batch) -> Tensor:
    return hidden_loss(output_BTD, batch.target_BTD)
