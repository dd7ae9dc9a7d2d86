"""Finding the blocks of a model and their FFN units, by looking at its modules.

The model may be on the meta device: only shapes and names of attributes count. What is found is a
guess, which `cfsp.architecture.proof` proves or refuses.

An FFN is a module whose matrices lead D -> F -> D:

    down    the one matrix from F to D
    up      one or two matrices from D to F (gate and up), or one from D to 2 F (both in one)

and that has no other matrix. Experts are the same with a leading axis of E on every parameter.

Shapes: E experts, F FFN channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn

from cfsp.architecture.found import (
    Architecture,
    ChannelAxis,
    FFNUnit,
    Refusal,
    WidthAttribute,
)
from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attributes that nothing computes with although they may equal a width by chance.
_NO_WIDTHS = frozenset({"layer_idx", "padding_idx", "num_experts", "top_k"})


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Return the blocks of a model and the FFN units that they seem to have.

    Args:
        model: a causal language model, or a multimodal one with a text decoder inside.

    Raises:
        UnsupportedModelError: there is no list of blocks, or no FFN in any of them.
    """
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    hidden = _hidden_size(text_config)
    found: list[tuple[str, nn.ModuleList, tuple[FFNUnit, ...], tuple[Refusal, ...]]] = []
    for path, blocks in _block_lists(model, text_config):
        units: list[FFNUnit] = []
        refused: list[Refusal] = []
        for index, block in enumerate(blocks):
            for unit in _units_of(block, index, hidden):
                if isinstance(unit, Refusal):
                    module = ".".join(p for p in (path, str(index), unit.module) if p)
                    refused.append(Refusal(module, unit.reason))
                else:
                    units.append(unit)
        found.append((path, blocks, tuple(units), tuple(refused)))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks that cfsp could find; expected "
            "a ModuleList with one entry for each layer of the text decoder; please report the "
            "model type"
        )
    # A list that has FFNs rather than one that has none; the longest; the first.
    path, blocks, chosen, looked_alike = max(
        found, key=lambda entry: (bool(entry[2]), len(entry[1]))
    )
    return Architecture(
        class_name=type(model).__name__,
        decoder=_path_of(model, model.get_decoder()),
        blocks=path,
        block_count=len(blocks),
        units=chosen,
        refused=looked_alike,
        learnt_positions=_learnt_positions(model, path, text_config),
    )


def _hidden_size(text_config: Any) -> int:
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        value = getattr(text_config, key, None)
        if isinstance(value, int):
            return value
    raise UnsupportedModelError(
        f"the config of model type {text_config.model_type!r} names no hidden_size; "
        "please report it"
    )


def _block_lists(model: Any, text_config: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules in the text decoder that may be its blocks."""
    decoder = model.get_decoder()
    base = _path_of(model, decoder)
    inside: list[str] = []
    for name, module in decoder.named_modules():
        path = f"{base}.{name}" if base and name else base or name
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList) and len(module) == _layers(text_config):
            inside.append(path)
            yield path, module


def _learnt_positions(model: nn.Module, blocks: str, text_config: Any) -> int | None:
    """Return the longest input if there is a table with a row for each of its positions."""
    longest = getattr(text_config, "max_position_embeddings", None)
    # Some tables begin with rows for padding.
    lengths = range(longest, longest + 4) if isinstance(longest, int) else ()
    decoder = model.get_submodule(blocks.rpartition(".")[0])
    for name, module in decoder.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings in lengths
        if is_table and ("pos" in name or "wpe" in name):
            return longest
    return None


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is part)


def _layers(text_config: Any) -> int:
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        value = getattr(text_config, key, None)
        if isinstance(value, int):
            return value
    return -1


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a module, or one for each of its experts.

    Attributes:
        name: dotted path of the parameter from the module.
        shape: outputs and inputs as far as known: see `transposed`.
        experts: length of the leading axis; None of a single matrix.
        transposed: whether it is stored inputs x outputs; None if nobody says.
    """

    name: str
    shape: tuple[int, int]
    experts: int | None
    transposed: bool | None


def _units_of(block: nn.Module, index: int, hidden: int) -> Iterator[FFNUnit | Refusal]:
    inside: list[str] = []
    for path, module in block.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        unit = _unit(block, path, module, index, hidden)
        if unit is not None:
            if path:
                inside.append(path)
            yield unit


def _unit(
    block: nn.Module, path: str, module: nn.Module, index: int, hidden: int
) -> FFNUnit | Refusal | None:
    """Return the FFN that a module is; None if it does not look like one."""
    matrices = list(_matrices(module))
    if not 2 <= len(matrices) <= 3 or len({matrix.experts for matrix in matrices}) != 1:
        return None
    flags = {matrix.transposed for matrix in matrices}
    orders = (False, True) if flags == {None} else (None,)
    for order in orders:
        roles = _roles(matrices, hidden, order)
        if roles is not None:
            break
    else:
        return None
    gate, up, down, width, transposed = roles
    experts = up.experts
    lead = 0 if experts is None else 1
    fused = "halves" if getattr(module, "is_concatenated", True) else "interleaved"
    out_axis, in_axis = (lead + 1, lead) if transposed else (lead, lead + 1)
    is_fused = gate is up
    axes = {
        matrix.name: ChannelAxis(out_axis, fused if is_fused else None)  # type: ignore[arg-type]
        for matrix in dict.fromkeys((gate, up))
        if matrix is not None
    }
    axes[down.name] = ChannelAxis(in_axis)
    named = {matrix.name for matrix in matrices}
    for name, parameter in _own_parameters(module):
        if name in named:
            continue
        lengths = tuple(parameter.shape)[lead:]
        if not lengths or (lengths == (hidden,) and width != hidden):
            continue
        owner = next((m for m in (up, gate) if m and _is_bias(name, m.name)), None)
        if owner is not None and lengths[0] in (width, 2 * width):
            axes[name] = ChannelAxis(lead, fused if lengths[0] == 2 * width else None)  # type: ignore[arg-type]
        elif _is_bias(name, down.name):
            continue
        elif width in lengths or 2 * width in lengths:
            where = f"{path}.{name}" if path else name
            return Refusal(
                path, f"{where} of shape {list(parameter.shape)} acts between up and down"
            )
    prefix = f"{path}." if path else ""
    return FFNUnit(
        block=index,
        path=path,
        width=width,
        ffns=experts or 1,
        up=prefix + up.name,
        gate=None if gate is None else prefix + gate.name,
        down=prefix + down.name,
        axes={prefix + name: axis for name, axis in axes.items()},
        attributes=tuple(_attributes(module, path, width, hidden, is_fused, up, gate, down)),
        routed=experts is not None,
    )


def _is_bias(name: str, matrix: str) -> bool:
    """Return whether a parameter is the bias of a matrix, by what both are called."""
    stem = matrix.removesuffix(".weight")
    return name in (f"{stem}.bias", f"{stem}_bias", f"{matrix}_bias")


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module and of its children that have no children."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if next(child.children(), None) is None:
            for key, parameter in child.named_parameters(recurse=False):
                yield f"{name}.{key}", parameter


def _matrices(module: nn.Module) -> Iterator[_Matrix]:
    experts_flag = getattr(module, "is_transposed", None)
    for name, parameter in _own_parameters(module):
        owner, _, key = name.rpartition(".")
        child = module.get_submodule(owner) if owner else module
        if isinstance(child, nn.Embedding):
            continue
        if parameter.ndim == 3 and not _is_convolution(child) and parameter.shape[1] > 1:
            transposed = experts_flag if isinstance(experts_flag, bool) else None
            yield _Matrix(name, _pair(parameter.shape[1:]), parameter.shape[0], transposed)
        elif parameter.ndim == 2 and "bias" not in key:
            known = isinstance(child, nn.Linear) or hasattr(child, "nf")
            yield _Matrix(
                name, _pair(parameter.shape), None, hasattr(child, "nf") if known else None
            )


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _pair(shape: Any) -> tuple[int, int]:
    first, second = shape
    return int(first), int(second)


def _roles(
    matrices: list[_Matrix], hidden: int, order: bool | None
) -> tuple[_Matrix | None, _Matrix, _Matrix, int, bool] | None:
    """Return gate, up, down, width and whether stored inputs x outputs; None if it is no FFN.

    Args:
        matrices: two or three.
        hidden: D.
        order: whether to take the matrices as inputs x outputs; None if each says itself.
    """

    def ends(matrix: _Matrix) -> tuple[int, int]:
        transposed = matrix.transposed if order is None else order
        outputs, inputs = matrix.shape[::-1] if transposed else matrix.shape
        return outputs, inputs

    for down in reversed(matrices):
        outputs, width = ends(down)
        if outputs != hidden:
            continue
        ups = [matrix for matrix in matrices if matrix is not down]
        if any(ends(matrix)[1] != hidden for matrix in ups):
            continue
        widths = [ends(matrix)[0] for matrix in ups]
        transposed = bool(down.transposed if order is None else order)
        if widths == [width, width]:
            gate, up = sorted(ups, key=lambda m: not _sounds_like_gate(m.name))
            return gate, up, down, width, transposed
        if widths == [width]:
            return None, ups[0], down, width, transposed
        if widths == [2 * width]:
            return ups[0], ups[0], down, width, transposed
    return None


def _sounds_like_gate(name: str) -> bool:
    stem = name.removesuffix(".weight").rpartition(".")[2]
    return "gate" in name or stem in ("w1", "wi_0", "linear_1")


def _attributes(
    module: nn.Module,
    path: str,
    width: int,
    hidden: int,
    is_fused: bool,
    up: _Matrix,
    gate: _Matrix | None,
    down: _Matrix,
) -> Iterator[WidthAttribute]:
    """Yield the numbers that tell the width, in the module and in those of its matrices."""
    prefix = f"{path}." if path else ""
    for matrix in dict.fromkeys(m for m in (gate, up, down) if m is not None):
        owner = matrix.name.rpartition(".")[0]
        if not owner:
            continue
        child = module.get_submodule(owner)
        mine = ("in_features", "nx", "input_size") if matrix is down else (
            "out_features", "nf", "output_size")  # fmt: skip
        times = 2 if is_fused and matrix is not down else 1
        for name in mine:
            if getattr(child, name, None) == times * width:
                yield WidthAttribute(prefix + owner, name, times)
    for (name, value), times in product(list(vars(module).items()), (1, 2)):
        if (
            type(value) is int
            and value == times * width
            and value != hidden
            and name not in _NO_WIDTHS
            and path
        ):
            yield WidthAttribute(path, name, times)
