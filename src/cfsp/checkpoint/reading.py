"""A model as a lazy thing: its config, the names of its tensors, and a way to read one.

`WeightSource` is all that calibration, planning and surgery know of a model. It is either a
`Checkpoint` (a directory with safetensors) or a `LoadedModel` (a transformers model in memory).

Shapes: D hidden, F FFN channels, K channels that stay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.found import INTERLEAVED, Architecture, Unit
from cfsp.checkpoint.config_file import read_config
from cfsp.checkpoint.conversion import missing_prefix, stored_from_memory
from cfsp.checkpoint.own_files import check_links, digests_beside_weights
from cfsp.checkpoint.quantisation import check_is_not_packed, dequantised
from cfsp.checkpoint.skeleton import (
    architecture_of,
    build_skeleton,
    check_is_of_its_config,
    empty_model,
)
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import (
    AGAIN,
    MadeTensor,
    StoredTensor,
    TensorSpec,
    read_weights,
)
from cfsp.checkpoint.text_config import prediction_layers, text_config_of
from cfsp.errors import CheckpointError
from cfsp.settings import DEFAULT_PARTS, Part

# What of each tensor tells models apart: so many runs of so many values.
_RUNS, _RUN_VALUES = 4, 1024
# What the blocks can compute with; others are quantised, and their scales are tensors of their own.
_COMPUTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightSource:
    """What the stages need of a model, whose weights do not change: config and tensors."""

    config: PreTrainedConfig
    architecture: Architecture
    stored: StoredTensors
    label: str  # what people call it

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every stored tensor by its name, in their order."""
        return {name: tensor.spec for name, tensor in self.stored.tensors.items()}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the model, of the parts that it was opened with."""
        return self.architecture.units

    @property
    def parameters(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every stored parameter and buffer by its name in the model."""
        # Of tied ones only that which the others take their values from.
        return self.stored.parameters

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameters that nothing is stored of, and the one whose value each has."""
        return self.stored.tied

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def parameter_count(self) -> int:
        """The number of stored parameters; tied ones count once, also where both are stored."""
        every = sum(spec.elements for spec in self.specs.values())
        return every - sum(self.parameters[name].elements for name in self.copies)

    @cached_property
    def copies(self) -> frozenset[str]:
        """Tied parameters that are stored as well, with the values of those they are tied to."""
        pairs = self.stored.twice.items()
        return frozenset(name for name, to in pairs if _is_copy(self, name, to))

    @cached_property
    def fingerprint(self) -> str:
        """A hex digest that tells models apart, cheap enough to compute at every start.

        It covers the model type, and of every tensor name, shape and some kilobytes from all over
        it, in float32: a model and its upcast copy are the same, in any files, and a fine-tuned
        copy is another, unless only single rows were tuned.
        """
        digest = hashlib.sha256(self.config.model_type.encode())
        for name, tensor in sorted(self.stored.tensors.items()):
            digest.update(f"{name}{list(tensor.spec.shape)}".encode())
            digest.update(_some_values(tensor).numpy().tobytes())
        return digest.hexdigest()[:32]

    def origin(self, name: str) -> str:
        """Return what a parameter is called in the model that this one is cut from."""
        return name

    def parameter(
        self, name: str, dtype: torch.dtype | None = None, expert: int | None = None
    ) -> Tensor:
        """Return a parameter, also a tied one, or one expert's part; None as dtype is its own."""
        return self.stored.assemble(self.tied.get(name, name), dtype, expert)

    def read(self, name: str) -> Tensor:
        """Return one stored tensor in its dtype."""
        return self.stored.tensors[name].read()


class Checkpoint(WeightSource):
    """A model directory with safetensors; opening it reads only config and headers.

    One that is stored quantised is seen as the plain model: config and tensors say nothing of it,
    and a tensor is dequantised when it is read. Only units of `parts` are found.

    Raises:
        CheckpointError: no config, no safetensors, a missing or truncated shard, or tensors
            whose shapes contradict the config.
        UnsupportedModelError: no FFN of the model can be cut, or no attention if that is asked for.
    """

    def __init__(
        self, directory: Path, label: str | None = None, parts: tuple[Part, ...] = DEFAULT_PARTS
    ) -> None:
        self.directory = directory
        self.label = label or str(directory)
        check_links(directory)
        self.config, self.quantisation = read_config(directory)
        self.architecture = architecture_of(self.config, parts)
        model = empty_model(self.config)
        files = read_weights(directory)
        stored: Mapping[str, StoredTensor] = files
        check_is_not_packed(files, self.label)
        if self.quantisation is not None:
            # What dequantised weights become is what the config says, else bfloat16.
            dtypes = (self.config.dtype, text_config_of(self.config).dtype)
            dtype = next((each for each in dtypes if each in _COMPUTABLE), torch.bfloat16)
            stored = dequantised(files, self.quantisation, dtype, self.label)
        prefix = missing_prefix(model, stored)
        # By their names in the model.
        tensors = {prefix + name: tensor for name, tensor in stored.items()}
        self.stored = StoredTensors.of(model, self.architecture, tensors, self.label)
        _check_stored(self, model)

    @cached_property
    def identity(self) -> str:
        """A hex digest of all that a result depends on: weights, and every file read with them."""
        beside = digests_beside_weights(self.directory)
        return hashlib.sha256(f"{self.fingerprint}{beside}".encode()).hexdigest()[:32]


class LoadedModel(WeightSource):
    """A transformers model in memory, seen as a weight source.

    Nothing is copied, but for what was made in inference mode.
    """

    def __init__(self, model: PreTrainedModel, parts: tuple[Part, ...] = DEFAULT_PARTS) -> None:
        config = getattr(model, "config", None)
        if not issubclass(type(model), nn.Module) or not isinstance(config, PreTrainedConfig):
            raise CheckpointError(
                f"expected a path or a transformers model, found a {type(model).__name__}"
            )
        if getattr(model.config, "quantization_config", None):
            raise CheckpointError(
                "the model in memory is quantised, or transformers will save it so; give its path "
                "instead, or load it with cfsp.load, which dequantises it"
            )
        self.model = model
        self.config = model.config
        self.architecture = architecture_of(model.config, parts)
        self.label = model.config._name_or_path or type(model).__name__
        check_is_of_its_config(model)
        tensors = {name: MadeTensor.of(each) for name, each in stored_from_memory(model).items()}
        self.stored = StoredTensors.of(model, self.architecture, tensors, self.label)
        _check_stored(self, model)

    def as_loaded(self) -> PreTrainedModel:
        """Return a model with the same tensors and modules of its own, as loading makes them.

        Dropout of training mode would measure noise, and hooks and compiled calls are the user's.
        """
        loaded = build_skeleton(self.config, self.model.dtype).requires_grad_(False)
        loaded.load_state_dict(self.model.state_dict(), assign=True)
        return loaded.to(self.model.device)


def in_memory(model: PreTrainedModel, parts: tuple[Part, ...]) -> LoadedModel:
    """Take a user's model as a source; all of it must be there."""
    source = LoadedModel(model, parts)
    if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(
            f"{empty[0]} of the model in memory has no values there, as after offloading; give its "
            "path instead, which streams block by block"
        )
    return source


def _some_values(tensor: StoredTensor) -> Tensor:
    """Return what of a stored tensor tells it from another, in float32."""
    parts = (tensor.read_part(part.start, part.stop) for part in _spread(tensor.spec.elements))
    return torch.cat([part.cpu() for part in parts]).to(torch.float32)


def _spread(elements: int) -> list[slice]:
    """Return which values of a tensor tell it from another: runs of them, the last ones too."""
    if elements <= _RUNS * _RUN_VALUES:
        return [slice(0, elements)]
    starts = [run * (elements - _RUN_VALUES) // (_RUNS - 1) for run in range(_RUNS)]
    return [slice(start, start + _RUN_VALUES) for start in starts]


def _is_copy(source: WeightSource, parameter: str, other: str) -> bool:
    """Return whether a parameter is stored with the values of another one: else it is its own."""
    one, two = (
        [_some_values(source.stored.tensors[name]) for name in source.stored.sources(each)]
        for each in (parameter, other)
    )
    return len(one) == len(two) and all(map(torch.equal, one, two))


def ffn_parameters_per_channel(source: WeightSource) -> tuple[int, ...]:
    """Return how many parameters one channel of every FFN unit owns, of each of its experts."""
    owned = [0] * len(source.units)
    for name, (index, _) in channel_parameters(source.architecture).items():
        owned[index] += source.parameters[name].elements // source.units[index].width
    return tuple(owned)


def channel_parameters(architecture: Architecture) -> dict[str, tuple[int, str]]:
    """Return the parameters with channels by name: the unit's index, and the path in the block."""
    return {
        architecture.block_prefix(unit.block) + path: (index, path)
        for index, unit in enumerate(architecture.units)
        for path in unit.axes
    }


class FFNWeights(NamedTuple):
    """The matrices of one FFN as they are stored; of an attention the output matrix alone.

    Metrics convert one at a time to float32: three copies of a wide FFN would be more memory than
    anything else that the pass of the repair needs.
    """

    down_DF: Tensor
    up_FD: Tensor | None = None
    gate_FD: Tensor | None = None


def read_ffn_weights(source: WeightSource, unit: Unit, ffn: int) -> FFNWeights:
    """Read the matrices of one FFN of a unit to the CPU, however its checkpoint stores them."""
    down_DF = down_matrix(source, unit, ffn).cpu()
    if unit.part == "kv":
        return FFNWeights(down_DF)
    up_FD = _matrix(source, unit, unit.up, ffn).cpu()
    if unit.gate is None:
        return FFNWeights(down_DF, up_FD)
    if unit.gate != unit.up:
        return FFNWeights(down_DF, up_FD, _matrix(source, unit, unit.gate, ffn).cpu())
    # Both are one parameter, which may be read from several tensors: it is read once.
    if unit.axes[unit.up].spans == INTERLEAVED:
        return FFNWeights(down_DF, up_FD[1::2], up_FD[::2])
    gate_FD, up_FD = up_FD.chunk(2)
    return FFNWeights(down_DF, up_FD, gate_FD)


def down_matrix(source: WeightSource, unit: Unit, ffn: int = 0) -> Tensor:
    """Return the down projection of one FFN, D x F; of an attention its output matrix."""
    return _matrix(source, unit, unit.down, ffn)


def _matrix(source: WeightSource, unit: Unit, path: str, ffn: int) -> Tensor:
    """Return a parameter of one FFN as outputs x inputs."""
    name = source.architecture.block_prefix(unit.block) + path
    matrix = source.parameter(name, expert=ffn if unit.routed else None)
    return matrix.T if _is_transposed(unit, path) else matrix


def parameters_with_down(
    source: WeightSource, unit: Unit, down_of: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Return new down projections (D x K) of a unit's FFNs as its parameter, by its `origin`."""
    downs = [down.T if _is_transposed(unit, unit.down) else down for down in down_of.values()]
    name = source.origin(source.architecture.block_prefix(unit.block) + unit.down)
    return {name: torch.stack(downs) if unit.routed else downs[0].contiguous()}


def _is_transposed(unit: Unit, path: str) -> bool:
    """Return whether a matrix is inputs x outputs: the outputs of `down` are no channels."""
    return (unit.axes[path].axis - unit.routed == 0) == (path == unit.down)


def read_tensors(
    module: nn.Module,
    prefix: str,
    source: WeightSource,
    dtype: torch.dtype,
    instead: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of a module, whose names begin with `prefix` in the source.

    It touches nothing but the file, so that a thread can read ahead. Parameters become `dtype`,
    buffers stay as they are stored; `instead` has parameters that take the place of the source's,
    by their `origin`.
    """
    instead, found = instead or {}, {}
    parameters = dict(module.named_parameters())
    for name, tensor in module.state_dict(keep_vars=True).items():
        whole, of_one = prefix + name, dtype if isinstance(tensor, nn.Parameter) else None
        if (origin := source.origin(whole)) in instead:
            found[name] = instead[origin].to(of_one)
        elif name in parameters or whole in source.parameters:
            found[name] = source.parameter(whole, of_one)
    return found


def _check_stored(source: WeightSource, model: PreTrainedModel) -> None:
    """Check that the weights can be computed with, and that none is of a block too many."""
    with_channels = channel_parameters(source.architecture)
    for name, spec in source.parameters.items():
        dtype = spec.dtype
        # What else has 8 bits has a scale somewhere; tables of numbers and masks have none.
        is_packed = dtype.itemsize == 1 and dtype != torch.bool
        if dtype not in _COMPUTABLE and (is_packed or name in with_channels):
            raise CheckpointError(
                f"{source.label}: {source.stored.sources(name)[0]} is stored as "
                f"{str(dtype).removeprefix('torch.')}; "
                "save the model in float32, bfloat16 or float16"
            )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # transformers ignores those of the sizes that it knows; a config may name them at any size.
    count = source.architecture.block_count
    told = range(count, count + prediction_layers(source.config))
    for name in source.stored.behind(source.architecture):
        is_told = source.architecture.block_of(name) in told
        if not is_told and not any(re.search(pattern, name) for pattern in ignored):
            raise CheckpointError(
                f"{source.label} has a tensor {name}, but its config says that there are "
                f"{count} blocks; {AGAIN}"
            )
