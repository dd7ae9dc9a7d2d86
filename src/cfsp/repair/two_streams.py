"""Repair of the pruned stream beside the dense one: what fitting and training have in common.

The dense stream passes a block. Where a group of blocks ends, the pruned blocks are repaired, which
see both streams; then the pruned stream passes them. Blocks that were removed whole belong to the
one before them, or else to the first that stays: what that should give is what the dense stream
holds after them.

Row n of the hidden states is the process's window n of the text in the dense stream; all rows of
the pruned stream come behind those.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import WeightSource, read_tensors
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, fill, unload
from cfsp.cut.surgery import PrunedSource
from cfsp.job import Job
from cfsp.processes import Team
from cfsp.repair.result import BlockRepair, PruningResult, add_step, write_tensors
from cfsp.streaming.block_calls import BlockCall
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.runtime import Runtime, no_number
from cfsp.text.windows import Windows, joined

# So few batches there are at least, so that they differ.
_LEAST_BATCHES = 8
# The root of zero has no gradient, and a block that loses no channel may have no error.
_LEAST_SQUARE = 1e-12

log = logging.getLogger(__name__)


class BlockGroup:
    """Some blocks of a model, which compute one after the other, called as the model calls them.

    They have no weights before the first `fill`. Calls are by the number of windows in a batch.
    """

    def __init__(
        self,
        source: WeightSource,
        modules: nn.ModuleList,
        indices: range,
        calls: Mapping[int, Sequence[BlockCall]],
        runtime: Runtime,
    ) -> None:
        self._source, self._runtime = source, runtime
        self.indices, self.modules = indices, [modules[index] for index in indices]
        self._recorded_calls = self._calls = calls

    def outputs(self, hidden_BTD: Tensor) -> Iterator[Tensor]:
        """Yield every block's output."""
        for module, call in zip(self.modules, self._calls[len(hidden_BTD)], strict=True):
            hidden_BTD = call(module, hidden_BTD)
            yield hidden_BTD

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return the last block's output."""
        *_, output_BTD = self.outputs(hidden_BTD)
        return output_BTD

    def fill(self, instead: Mapping[str, Tensor] | None = None) -> None:
        """Compute with the source's tensors, but for some new ones by origin."""
        self._calls = self._recorded_calls
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = self._source.architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, self._runtime.dtype, instead)
            fill(module, tensors, self._runtime.device)

    def fill_for_training(self) -> list[dict[str, nn.Parameter]]:
        """Compute in float32; return what is trained, and alone has gradients, of each block.

        It is the parameters of its units, the bias of the down projection too.
        """
        self._calls = {
            size: [call.for_training() for call in calls]
            for size, calls in self._recorded_calls.items()
        }
        architecture, trained = self._source.architecture, []
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, torch.float32)
            # Copies, because the tensors of a model in memory are its own.
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            fill(module, copies, self._runtime.device)
            names = {
                name
                for unit in architecture.units_of(index)
                for name in (*unit.axes, f"{unit.down.removesuffix('weight')}bias")
            }
            of_units = {
                prefix + name: parameter
                for name, parameter in module.named_parameters()
                if name in names
            }
            for parameter in of_units.values():
                parameter.requires_grad_(True)
            trained.append(of_units)
        return trained


class Split:
    """The windows of a text in batches of about so many tokens; to some nothing is fitted.

    Those of one of several processes: of all processes `every_held_out` are held out.
    """

    def __init__(self, windows: Windows, tokens_in_batch: int, team: Team) -> None:
        every, self.seqlen = windows.tokens_NT.shape
        least = max(_LEAST_BATCHES, team.size)
        self.team, self.batch = team, max(1, min(tokens_in_batch // self.seqlen, every // least))
        own = team.share(every, self.batch)
        self.windows, self.count = windows.part(own), own.stop - own.start
        self.every_held_out = int(windows.held_out_N.sum())
        self.held_out: list[int] = windows.held_out_N[own].nonzero().flatten().tolist()
        self.fitted = [window for window in range(self.count) if window not in self.held_out]
        self.batches, self.judged = self._batched(range(self.count)), self._batched(self.held_out)
        # All numbers of windows that blocks are ever called with.
        self.batch_sizes = {self.batch, *map(len, self.batches), *map(len, self.judged)}

    def _batched(self, windows: Sequence[int]) -> list[list[int]]:
        return [list(windows[i : i + self.batch]) for i in range(0, len(windows), self.batch)]


class Batch(NamedTuple):
    """Some windows of both streams at a group of blocks."""

    input_BTD: Tensor  # of the pruned stream, as they enter the first of the blocks
    dense_BTD: Tensor  # of the dense stream, as they leave the last of them
    turn: int = 0  # number of the batch among those of its kind, from 0


# Of the hidden states that the blocks give for a batch, BTD.
Loss = Callable[[Tensor, Batch], Tensor]


def token_error(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return |output - dense| / |dense| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others, or more, and would be all that counts.
    """
    dense = dense_BTD.float()
    difference = output_BTD.float() - dense
    energy = dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy + _LEAST_SQUARE).sqrt().mean()


def hidden_loss(output_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the error of each token, averaged, and that of all together, added.

    The second guards the few tokens of huge energy, which attention of other tokens rests on: if
    they lose it, or others gain it, all later blocks break, and one in a thousand hardly shows in
    the first.
    """
    dense = batch.dense_BTD.float()
    energy = dense.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    whole = ((output_BTD.float() - dense).square().sum() / energy + _LEAST_SQUARE).sqrt()
    return token_error(output_BTD, batch.dense_BTD) + whole


@dataclass(frozen=True)
class Judgement:
    """How far blocks are from the dense model, on held-out windows."""

    # Of each block's output hidden states, relative to the dense stream (see `token_error`).
    error_L: list[float]
    loss: float  # what is to become less, such as `hidden_loss`

    @property
    def is_finite(self) -> bool:
        """Whether neither the last error nor the loss is NaN or infinite."""
        return math.isfinite(self.error_L[-1]) and math.isfinite(self.loss)


def block_repair(
    before: Judgement,
    after: Judgement | None,
    *,
    strength: float | None = None,
    training_steps: int = 0,
) -> BlockRepair:
    """Return what a step did with blocks of the pruned stream; `after` is None if they stay."""
    left = before if after is None else after
    return {
        "blocks": len(before.error_L),
        "error_before": before.error_L[-1],
        "error_after": left.error_L[-1],
        "kept": after is not None,
        "strength": strength,
        "training_steps": training_steps,
        "loss_before": before.loss,
        "loss_after": left.loss,
    }


class GroupVisit:
    """A group of pruned blocks with their weights, and both streams around it.

    `dense_after` has the held-out windows of the dense stream after each of its blocks that the
    group stands for; `last` is the index of the group's last block in the pruned model.
    """

    def __init__(
        self, blocks: BlockGroup, block: StreamedBlock, split: Split, dense_after: list[Tensor]
    ) -> None:
        self.blocks, self.split, self.device = blocks, split, block.device
        self.last = blocks.indices[-1]
        self._block, self._dense_after, self._reported = block, dense_after, 0

    def batch(self, windows: Sequence[int], turn: int = 0) -> Batch:
        """Return some windows of both streams."""
        hidden, dense = self._block.hidden, list(windows)
        input_BTD = hidden.read([self.split.count + window for window in windows])
        return Batch(input_BTD.to(self.device), hidden.read_written(dense).to(self.device), turn)

    def judge(self, loss_of: Loss) -> Judgement:
        """Return how far the group is from the dense stream on the held-out windows of all."""
        error_L, loss, done = [0.0] * len(self._dense_after), 0.0, 0
        for turn, windows in enumerate(self.split.judged):
            batch, share = self.batch(windows, turn), len(windows) / self.split.every_held_out
            outputs = list(self.blocks.outputs(batch.input_BTD))
            for position, (output_BTD, dense_NTD) in enumerate(
                zip(outputs, self._dense_after, strict=True)
            ):
                dense_BTD = dense_NTD[done : done + len(windows)].to(self.device)
                error_L[position] += share * float(token_error(output_BTD, dense_BTD))
            loss += share * float(loss_of(outputs[-1], batch))
            done += len(windows)
        of_processes = self.split.team.gather([loss, *error_L])
        loss, *error_L = map(math.fsum, zip(*of_processes, strict=True))
        return Judgement(error_L, loss)

    def judge_unchanged(self, loss_of: Loss) -> Judgement:
        """Return the same of the group as it is, which must give numbers."""
        judgement = self.judge(loss_of)
        if not judgement.is_finite:
            block = self._block
            raise no_number(
                f"block {block.index} produced NaN or infinite activations", block.dtype
            )
        return judgement

    def accept(
        self, before: Judgement, tensors: Mapping[str, Tensor], loss_of: Loss
    ) -> Judgement | None:
        """Take new tensors, by origin, if held-out windows lose less; else return None."""
        self.blocks.fill(tensors)
        after = self.judge(loss_of)
        if after.is_finite and after.loss < before.loss:
            return after
        self.blocks.fill()
        return None

    def progress(self, done: float) -> None:
        """Report which part of the work on the group is done, from 0 to 1."""
        tokens = round(done * self.split.count * self.split.seqlen * len(self.blocks.modules))
        self._block.tokens_done(tokens - self._reported)
        self._reported = tokens


# What a repair did with a group, and the new tensors if they are kept.
Repaired = tuple[BlockRepair, Mapping[str, Tensor]]


class TwoStreams(Visitor[BlockRepair | None]):
    """A step of repair on the pruned model's own hidden states.

    Processes share the windows where it `waits_for_others`; else the first has all of them.
    """

    def __init__(
        self, name: str, job: Job, repaired: PruningResult, windows: Windows, tokens_in_batch: int
    ) -> None:
        super().__init__(name)
        self._job, self._repaired = job, repaired
        self.pruned = PrunedSource(job.source, repaired.plan, repaired.tensors)
        team = job.work_dir.team if self.waits_for_others else Team()
        self._split = Split(windows, tokens_in_batch, team)
        self.runtime = replace(job.runtime, batch_windows=self._split.batch)
        self.more_batch_sizes = self._split.batch_sizes
        skeleton = build_skeleton(self.pruned.config, job.runtime.dtype)
        self._modules = blocks_of(skeleton, self.pruned.architecture)
        removed, count = repaired.plan.removed_blocks, job.source.architecture.block_count
        # Indices in the dense model of the pruned model's blocks.
        self._kept = [block for block in range(count) if block not in removed]
        # See `GroupVisit`; the group is the one whose turn is next.
        self._dense_after: list[Tensor] = []
        self._directory = job.work_dir.first_directory_of(name)

    def group_of(self, block: int) -> range:
        """Return the blocks that are one group with any of them; indices in the pruned model."""
        return range(block, block + 1)

    @abstractmethod
    def work(self, group: GroupVisit) -> Repaired | None:
        """Repair a group that the dense stream has passed; None where nothing can be.

        It is left with the weights that the pruned stream goes through: the better ones.
        """

    def step(self) -> PruningResult:
        """Return what the step makes of what was there before it; errors are those of a pass."""
        team = self._job.work_dir.team
        if self.waits_for_others:
            at_last = self._pass()
            team.gather(None)  # the first has written all
        else:
            if team.size > 1 and team.is_first:
                log.info("%s: process 0 repairs alone, the others wait", self.name)
            at_last = team.from_first(self._pass)
        return add_step(self._repaired, self.name, self._directory, [[each] for each in at_last])

    def _pass(self) -> list[BlockRepair | None]:
        """Return what was done at each block of the dense model, of a group at its last."""
        source, both = self._job.source, joined([self._split.windows] * 2)
        results = pass_blocks(source, both, self, self.runtime, self._job.work_dir)
        at_last: list[BlockRepair | None] = [None] * len(results)
        for end, group in self._group_at.items():
            at_last[self._kept[group[-1]]] = results[end]
        return at_last

    @cached_property
    def _group_at(self) -> dict[int, range]:
        """The dense block after which each group is worked on."""
        kept = [*self._kept, self._job.source.architecture.block_count]
        groups = map(self.group_of, range(len(self._kept)))
        return {kept[group[-1] + 1] - 1: group for group in groups}

    def may_stop_after(self, block: int) -> bool:
        """Return whether a group ends there."""
        return block in self._group_at

    def visit(self, block: StreamedBlock) -> BlockRepair | None:
        """Let the dense stream pass a block, and the pruned one the group that ends with it."""
        split, hidden = self._split, block.hidden
        rows = [slice(batch[0], batch[-1] + 1) for batch in split.batches]
        block.pass_through(block.compute, rows)
        unload(block.module)
        if block.index not in self._kept:
            del self._dense_after[-1:]
        if block.index >= self._kept[0]:
            self._dense_after.append(hidden.read_written(split.held_out))
        block.tokens_done(split.count * split.seqlen)
        waiting = [slice(split.count + own.start, split.count + own.stop) for own in rows]
        if (indices := self._group_at.get(block.index)) is None:
            block.pass_through(lambda rows, hidden_BTD: hidden_BTD, waiting)
            hidden.swap_buffers()
            return None
        calls = {
            size: [block.calls.of(self._kept[index], size) for index in indices]
            for size in self.more_batch_sizes
        }
        blocks = BlockGroup(self.pruned, self._modules, indices, calls, self.runtime)
        blocks.fill()
        group = GroupVisit(blocks, block, split, self._dense_after)
        result, tensors = self.work(group) or (None, {})
        if result is not None and result["kept"] and split.team.is_first:
            write_tensors(self._directory, self._kept[group.last], tensors)
        block.pass_through(lambda rows, hidden_BTD: blocks(hidden_BTD), waiting)
        group.progress(1.0)
        for module in blocks.modules:
            unload(module)
        self._dense_after.clear()
        hidden.swap_buffers()
        return result
