"""Local reconstruction: each pruned block learns to give the dense model's hidden states.

Two streams of the same windows pass block by block: one through the dense model, one through the
pruned. A pruned block sees what the pruned blocks before it give, and its target is what the
dense stream holds after this block, so that it also corrects the drift that it inherits. In
memory are both streams, one dense block (and the next, which is read meanwhile) and one pruned
block with its optimizer. There is no backward pass through more than one block.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.calibration.block_pass import pass_blocks
from cfsp.calibration.block_stream import StreamedBlock
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, fill, read_tensors, unload
from cfsp.checkpoint.tensor_file import TensorFile, outgoing_tensor, write_tensor_file
from cfsp.errors import CalibrationError, TextError, UnsupportedModelError
from cfsp.restoration.local_training import LocalTraining, token_error, train_block
from cfsp.restoration.two_streams import TwoStreams

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.surgery import PrunedSource
    from cfsp.workplace import Workplace

PASS_NAME = "reconstruct"

_MOST_SEEDS = 1 << 63


@dataclass(frozen=True)
class ReconstructedBlock:
    """How the reconstruction of one block went.

    The errors are those of the block's output hidden states on held-out windows of the pruned
    stream, relative to the dense stream (see `token_error`).

    Attributes:
        error_before: of the block as it was before.
        error_after: after training; None if that was no number.
        steps: of training.
        file: holds the trained tensors under their names in the model; None if the block was no
            better for training and stays as it was.
    """

    error_before: float
    error_after: float | None
    steps: int
    file: TensorFile | None

    def to_json(self) -> dict[str, Any]:
        """Return the errors, the steps, and whether the block was better for them."""
        fields = {"error_before": self.error_before, "error_after": self.error_after}
        return {**fields, "steps": self.steps, "is_better": self.file is not None}


def check_can_reconstruct(source: WeightSource) -> None:
    """Check that a model's blocks can be trained alone.

    Raises:
        UnsupportedModelError: they are mixtures of experts.
    """
    if source.family.experts is not None:
        raise UnsupportedModelError(
            f"--restore local trains blocks with one FFN, and those of {source.label} "
            f"({source.family.model_type}) have experts, each of which sees few tokens; "
            "use --restore ridge"
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
) -> list[ReconstructedBlock]:
    """Train every block of a pruned model in turn.

    Args:
        source: the dense model.
        pruned: what surgery would make of it, earlier repairs included.
        tokens_NT: windows; every eighth batch is held out.
        place: where trained tensors go, until they are in the new checkpoint.
        training: how blocks are trained.
        device: where to compute.
        dtype: what blocks compute in; parameters are trained in float32.
        seed: of the order in which windows are trained on.

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
    own_NT = tokens_NT[: streams.windows]
    skeleton = build_skeleton(pruned.config, dtype)
    work = _Reconstruction(
        pruned,
        blocks_of(skeleton, source.family),
        streams,
        training,
        dtype,
        seed,
        place.directory_of(PASS_NAME),
    )
    blocks = pass_blocks(
        source,
        torch.cat([own_NT, own_NT]),
        work.visit,
        _ReconstructedFiles(),
        name=PASS_NAME,
        device=device,
        dtype=dtype,
        batch_windows=streams.batch,
        place=place,
    )
    _say_what_was_left_alone(blocks)
    return blocks


@dataclass(frozen=True)
class _Reconstruction:
    """What stays the same from block to block."""

    pruned: PrunedSource
    modules: nn.ModuleList
    streams: TwoStreams
    training: LocalTraining
    dtype: torch.dtype
    seed: int
    directory: Path

    def visit(self, block: StreamedBlock) -> ReconstructedBlock:
        """Train one block, and let both streams pass."""
        block.pass_through(block.module, self.streams.dense)
        unload(block.module)
        module = self.modules[block.index]
        self._fill(module, block, {})
        before = self._held_out_error(block, module)
        if not math.isfinite(before):
            raise CalibrationError(
                f"block {block.index} produced NaN or infinite activations; "
                "prune with --dtype float32 or bfloat16"
            )
        trained, after, file = self._train(block, module, self.training.rates(before)), None, None
        if trained is not None:
            self._fill(module, block, trained)
            error = self._held_out_error(block, module)
            after = error if math.isfinite(error) else None
        if trained is not None and after is not None and after < before:
            file = _write(_tensor_path(self.directory, block.index), trained)
        else:
            self._fill(module, block, {})
        block.pass_through(module, map(self.streams.pruned, self.streams.dense))
        block.hidden.turn()
        unload(module)
        return ReconstructedBlock(before, after, self.training.steps, file)

    def _fill(self, module: nn.Module, block: StreamedBlock, trained: dict[str, Tensor]) -> None:
        """Make a pruned block compute with its tensors, some of them trained, by stored names."""
        prefix = self.pruned.family.block_prefix(block.index)
        tensors = read_tensors(module, prefix, self.pruned, self.dtype)
        tensors |= {name.removeprefix(prefix): t.to(self.dtype) for name, t in trained.items()}
        fill(module, tensors, block.device)

    def _held_out_error(self, block: StreamedBlock, module: nn.Module) -> float:
        call = block.call(self.streams.batch)
        errors = []
        for batch in self.streams.held_out:
            input_BTD = block.hidden.read(self.streams.pruned(batch)).to(block.device)
            target_BTD = block.hidden.read_written(batch).to(block.device)
            errors.append(float(token_error(call(module, input_BTD), target_BTD)))
        return sum(errors) / len(errors)

    def _train(
        self, block: StreamedBlock, module: nn.Module, rates: Sequence[float]
    ) -> dict[str, Tensor] | None:
        """Return the trained tensors in their stored dtypes; None if training diverged."""
        steps, tokens = len(rates), self.streams.tokens
        prefix = self.pruned.family.block_prefix(block.index)

        def on_step(step: int) -> None:
            block.tokens_done(tokens * (step + 1) // steps - tokens * step // steps)

        # Passes run in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(mode=False):
            tensors = read_tensors(module, prefix, self.pruned, torch.float32)
            fill(module, {name: tensor.clone() for name, tensor in tensors.items()}, block.device)
            trained = self._ffn_parameters(module, prefix)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            call = block.call(self.streams.batch).for_training()
            batches = self._batches(block)
            if not train_block(module, call, batches, rates, self.dtype, on_step):
                return None
            return {
                name: parameter.detach().to(self.pruned.specs[name].dtype)
                for name, parameter in trained.items()
            }

    def _ffn_parameters(self, module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
        """Return the FFN's parameters by stored names, the bias of its down projection too."""
        family = self.pruned.family
        bias = f"{prefix}{family.path_in_block(family.down)}.bias"
        parameters = {prefix + name: value for name, value in module.named_parameters()}
        return {
            name: value
            for name, value in parameters.items()
            if family.layout_of(name) is not None or name == bias
        }

    def _batches(self, block: StreamedBlock) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield input and target of random windows, every window once before any again."""
        generator = torch.Generator().manual_seed((self.seed + block.index) % _MOST_SEEDS)
        windows = self.streams.trained
        left: list[int] = []
        while True:
            while len(left) < self.streams.batch:
                order = torch.randperm(len(windows), generator=generator)
                left += [windows[i] for i in order.tolist()]
            chosen, left = left[: self.streams.batch], left[self.streams.batch :]
            one = [slice(i, i + 1) for i in chosen]
            input_BTD = torch.cat([block.hidden.read(self.streams.pruned(i)) for i in one])
            target_BTD = torch.cat([block.hidden.read_written(i) for i in one])
            yield input_BTD.to(block.device), target_BTD.to(block.device)


class _ReconstructedFiles:
    """Keeps what the pass did with one block beside its tensors, which are there already."""

    def save(self, result: ReconstructedBlock, directory: Path, block: int) -> None:
        facts = json.dumps(result.to_json())
        write_atomically(_facts_path(directory, block), facts.encode())

    def load(self, directory: Path, block: int) -> ReconstructedBlock:
        facts = json.loads(_facts_path(directory, block).read_text(encoding="utf-8"))
        file = TensorFile(_tensor_path(directory, block)) if facts.pop("is_better") else None
        return ReconstructedBlock(**facts, file=file)


def _facts_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.json"


def _tensor_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    write_tensor_file(path, [outgoing_tensor(name, tensor) for name, tensor in tensors.items()])
    return TensorFile(path)


def _say_what_was_left_alone(blocks: Sequence[ReconstructedBlock]) -> None:
    alone = [str(index) for index, block in enumerate(blocks) if block.file is None]
    if alone:
        print(
            f"blocks {', '.join(alone)} stay as ridge left them: on held-out windows training "
            "did not make them better",
            file=sys.stderr,
        )
