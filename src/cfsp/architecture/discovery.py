"""Finding the blocks of a model and their units, by looking at its modules.

The model may be on the meta device: only shapes and names of attributes count. What is found is a
guess, which `cfsp.architecture.proof` proves or refuses.

An FFN is a module whose matrices lead D -> F -> D:

    down    the one matrix from F to D
    up      one or two matrices from D to F (gate and up), or one from D to 2 F (both in one)

and that has no other matrix. Experts are the same with a leading axis of E on every parameter;
their D may be another one than the model's.

Shapes: E experts, F FFN channels, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cfsp.architecture.attentions import attentions_of, own_parameters
from cfsp.architecture.found import (
    Architecture,
    ChannelAxis,
    Fusion,
    Refusal,
    Unit,
    WidthAttribute,
)
from cfsp.errors import UnsupportedModelError
from cfsp.settings import Part

# Attributes that nothing computes with although they may equal a width by chance.
_NO_WIDTHS = frozenset({"layer_idx", "padding_idx", "num_experts", "top_k"})
# Attributes that may be widths even where the hidden size is the same number.
_SURELY_WIDTHS = re.compile(r"intermediate|ffn|inner|expert_dim")


def find_architecture(model: PreTrainedModel, part: Part = "ffn") -> Architecture:
    """Return the blocks of a model and the units of a part that they seem to have.

    Args:
        model: a causal language model, or a multimodal one with a text decoder inside.
        part: which units; attentions are found by `cfsp.architecture.attentions`, those that can
            only go whole with `attention`.

    Raises:
        UnsupportedModelError: there is no list of blocks.
    """
    decoder = _text_decoder(model)
    base = _path_of(model, decoder)
    text_config: Any = model.config.get_text_config(decoder=True)
    hidden = _hidden_size(text_config)
    candidates = []
    for path, blocks in _outermost_lists(decoder):
        found = [
            unit
            for index, block in enumerate(blocks)
            for unit in (
                _units_of(block, index, hidden)
                if part == "ffn"
                else attentions_of(block, index, hidden, text_config, part)
            )
        ]
        candidates.append((path, blocks, found))
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks that cfsp could find; expected "
            "a ModuleList in its text decoder; please report the model type"
        )

    def likelihood(candidate: tuple[str, nn.ModuleList, list[Unit | Refusal]]) -> Any:
        _path, blocks, found = candidate
        has_units = any(isinstance(unit, Unit) for unit in found)
        return len(blocks) == _layers(text_config), has_units, len(blocks)

    path, blocks, found = max(candidates, key=likelihood)
    path = f"{base}.{path}" if base else path
    refused = [
        Refusal(f"{path}.{refusal.module}", refusal.reason)
        for refusal in found
        if isinstance(refusal, Refusal)
    ]
    return Architecture(
        class_name=type(model).__name__,
        decoder=_innermost_model(model, path),
        blocks=path,
        block_count=len(blocks),
        units=tuple(unit for unit in found if isinstance(unit, Unit)),
        refused=tuple(refused),
        learnt_positions=_learnt_positions(decoder, text_config),
    )


def _text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that the blocks are in."""
    decoder: nn.Module = model.get_decoder()
    # Some call their output matrix `decoder`.
    has_blocks = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    base_model: nn.Module = model.base_model
    return decoder if has_blocks else base_model


def _innermost_model(model: PreTrainedModel, blocks: str) -> str:
    """Return the path to the module that takes token ids and calls the blocks."""
    path = blocks
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            break
    return path


def _path_of(model: nn.Module, part: nn.Module) -> str:
    path: str = next(path for path, module in model.named_modules() if module is part)
    return path


def _hidden_size(text_config: Any) -> int:
    found = _first_number(text_config, "hidden_size", "d_model", "n_embd", "dim")
    if found is not None:
        return found
    raise UnsupportedModelError(
        f"the config of model type {text_config.model_type!r} names no hidden_size; "
        "please report the model type"
    )


def _outermost_lists(decoder: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules in the text decoder that lie in no other list."""
    inside: list[str] = []
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(inside)):
            inside.append(f"{path}.")
            yield path, module


def _learnt_positions(decoder: nn.Module, text_config: Any) -> int | None:
    """Return the longest input if there is a table with a row for each of its positions."""
    longest = getattr(text_config, "max_position_embeddings", None)
    # Some tables begin with rows for padding.
    lengths = range(longest, longest + 4) if isinstance(longest, int) else ()
    for name, module in decoder.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings in lengths
        if is_table and ("pos" in name or "wpe" in name):
            return longest
    return None


def _layers(text_config: Any) -> int | None:
    return _first_number(text_config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _first_number(text_config: Any, *keys: str) -> int | None:
    """Return the value of the first of some keys that has a whole number; None if none has."""
    values = (getattr(text_config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), None)


def _units_of(block: nn.Module, index: int, hidden: int) -> list[Unit | Refusal]:
    found: dict[str, Unit | Refusal] = {}
    for path, module in block.named_modules():
        unit = _unit(module, path, index, hidden)
        if unit is not None:
            found[path] = unit
    # What has an FFN inside is none itself, but the block, which can have one beside.
    outer = {
        path
        for path in found
        if path and any(isinstance(found[p], Unit) for p in found if p.startswith(f"{path}."))
    }
    return [unit for path, unit in found.items() if path not in outer]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a module, or one for each of its experts.

    Attributes:
        name: dotted path of the parameter from the module.
        shape: of one matrix, as it is stored.
        experts: length of the leading axis; None of a single matrix.
        transposed: whether it is stored inputs x outputs; None if nobody says.
    """

    name: str
    shape: tuple[int, int]
    experts: int | None
    transposed: bool | None


@dataclass(frozen=True)
class _Roles:
    """What the matrices of an FFN are.

    Attributes:
        gate: the same as `up` where they are one matrix, None without a gate.
        up: from D to F, or to 2 F.
        down: from F to D.
        width: F.
        transposed: whether they are stored inputs x outputs.
    """

    gate: _Matrix | None
    up: _Matrix
    down: _Matrix
    width: int
    transposed: bool

    @property
    def lead(self) -> int:
        """How many axes come before those of a matrix."""
        return 0 if self.up.experts is None else 1


def _unit(module: nn.Module, path: str, index: int, hidden: int) -> Unit | Refusal | None:
    """Return the FFN that a module is; None if it does not look like one."""
    matrices = list(_matrices(module))
    if not 2 <= len(matrices) <= 3 or len({matrix.experts for matrix in matrices}) != 1:
        return None
    roles = _roles(matrices, hidden)
    if roles is None or _is_something_else(matrices, roles, hidden):
        return None
    axes = _axes(module, roles, hidden)
    if isinstance(axes, str):
        return Refusal(f"{index}.{path}".removesuffix("."), axes)
    prefix = f"{path}." if path else ""
    return Unit(
        block=index,
        path=path,
        width=roles.width,
        ffns=roles.up.experts or 1,
        up=prefix + roles.up.name,
        gate=None if roles.gate is None else prefix + roles.gate.name,
        down=prefix + roles.down.name,
        axes={prefix + name: axis for name, axis in axes.items()},
        attributes=tuple(_attributes(module, path, roles, hidden)),
        routed=roles.up.experts is not None,
    )


def _is_something_else(matrices: list[_Matrix], roles: _Roles, hidden: int) -> bool:
    """Return whether it is attention or a bottleneck, which it is cheap to tell from an FFN."""
    names = {matrix.name.removesuffix(".weight") for matrix in matrices}
    is_bottleneck = roles.gate is None and roles.lead == 0 and 2 * roles.width < hidden
    return names == {"query", "key", "value"} or is_bottleneck


def _matrices(module: nn.Module) -> Iterator[_Matrix]:
    experts_flag = getattr(module, "is_transposed", None)
    for name, parameter in own_parameters(module):
        owner, _, key = name.rpartition(".")
        child = module.get_submodule(owner) if owner else module
        if isinstance(child, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if parameter.ndim == 3 and parameter.shape[1] > 1:
            transposed = experts_flag if isinstance(experts_flag, bool) else None
            yield _Matrix(name, _pair(parameter.shape[1:]), parameter.shape[0], transposed)
        elif parameter.ndim == 2 and "bias" not in key:
            # Conv1D of gpt2 is stored inputs x outputs; `nf` is its number of outputs.
            known = isinstance(child, nn.Linear) or hasattr(child, "nf")
            transposed = hasattr(child, "nf") if known else None
            yield _Matrix(name, _pair(parameter.shape), None, transposed)


def _pair(shape: Any) -> tuple[int, int]:
    first, second = shape
    return int(first), int(second)


def _roles(matrices: list[_Matrix], hidden: int) -> _Roles | None:
    """Return what two or three matrices are to each other; None if they are no FFN."""
    known = {matrix.transposed for matrix in matrices} - {None}
    orders = (bool(known.pop()),) if len(known) == 1 else (False, True)
    for transposed in orders:
        for down in reversed(matrices):
            roles = _roles_with(down, matrices, transposed)
            if roles is None:
                continue
            (outputs, _inputs) = down.shape[::-1] if transposed else down.shape
            if outputs == hidden or roles.lead:
                return roles
    return None


def _roles_with(down: _Matrix, matrices: list[_Matrix], transposed: bool) -> _Roles | None:
    def ends(matrix: _Matrix) -> tuple[int, int]:
        outputs, inputs = matrix.shape[::-1] if transposed else matrix.shape
        return outputs, inputs

    outer, width = ends(down)
    ups = [matrix for matrix in matrices if matrix is not down]
    if any(ends(matrix)[1] != outer for matrix in ups):
        return None
    widths = [ends(matrix)[0] for matrix in ups]
    if widths == [width, width]:
        gate, up = sorted(ups, key=lambda matrix: not _sounds_like_gate(matrix.name))
        return _Roles(gate, up, down, width, transposed)
    if widths == [width]:
        return _Roles(None, ups[0], down, width, transposed)
    if widths == [2 * width]:
        return _Roles(ups[0], ups[0], down, width, transposed)
    return None


def _sounds_like_gate(name: str) -> bool:
    stem = name.removesuffix(".weight").rpartition(".")[2]
    return "gate" in name or stem in ("w1", "wi_0", "linear_1")


def _axes(module: nn.Module, roles: _Roles, hidden: int) -> dict[str, ChannelAxis] | str:
    """Return where the parameters of an FFN have channels, or why that cannot be said."""
    lead, width = roles.lead, roles.width
    fusion: Fusion = "halves" if getattr(module, "is_concatenated", True) else "interleaved"
    out_axis, in_axis = (lead + 1, lead) if roles.transposed else (lead, lead + 1)
    axes = {
        matrix.name: ChannelAxis(out_axis, fusion if roles.gate is roles.up else None)
        for matrix in (roles.gate, roles.up)
        if matrix is not None
    }
    axes[roles.down.name] = ChannelAxis(in_axis)
    for name, parameter in own_parameters(module):
        lengths = tuple(parameter.shape)[lead:]
        if name in axes or _is_bias(name, roles.down.name):
            continue
        is_bias = any(matrix and _is_bias(name, matrix.name) for matrix in (roles.gate, roles.up))
        # Where channels are as many as the hidden size, a norm may be of either.
        if lengths == (hidden,) and not is_bias:
            continue
        if lengths == (width,):
            axes[name] = ChannelAxis(lead)
        elif lengths == (2 * width,):
            axes[name] = ChannelAxis(lead, fusion)
        elif width in lengths or 2 * width in lengths:
            return (
                f"matrices: expected no others than gate, up and down, found {name} of shape "
                f"{list(parameter.shape)}"
            )
    return axes


def _is_bias(name: str, matrix: str) -> bool:
    """Return whether a parameter is the bias of a matrix, by what both are called."""
    stem = matrix.removesuffix(".weight")
    return name in (f"{stem}.bias", f"{stem}_bias", f"{matrix}_bias")


def _attributes(
    module: nn.Module, path: str, roles: _Roles, hidden: int
) -> Iterator[WidthAttribute]:
    """Yield the numbers that tell the width, in the module and in those of its matrices."""
    prefix = f"{path}." if path else ""
    for matrix in dict.fromkeys((roles.gate, roles.up, roles.down)):
        owner = matrix.name.rpartition(".")[0] if matrix else ""
        if not owner:
            continue
        inputs, outputs = ("in_features", "nx", "input_size"), ("out_features", "nf", "output_size")
        times = 2 if matrix is roles.gate is roles.up else 1
        for name in inputs if matrix is roles.down else outputs:
            if getattr(module.get_submodule(owner), name, None) == times * roles.width:
                yield WidthAttribute(prefix + owner, name, times)
    if not path:
        # The numbers of a block may be those of its attention.
        return
    for name, value in vars(module).items():
        if type(value) is not int or name in _NO_WIDTHS:
            continue
        if value == hidden and not _SURELY_WIDTHS.search(name):
            continue
        for times in (1, 2):
            if value == times * roles.width:
                yield WidthAttribute(path, name, times)
