"""Finding the FFNs of a block, by looking at its modules.

An FFN is a module whose matrices lead D -> F -> D:

    down    the one matrix from F to D
    up      one or two matrices from D to F (gate and up), or one from D to 2 F (both in one)

and that has no other matrix. Experts are the same with a leading axis of E on every parameter;
their D may be another one than the model's.

Shapes: E experts, F FFN channels, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from cfsp.architecture.found import HALVES, INTERLEAVED, ChannelAxis, Refusal, Unit, WidthAttribute

# Attributes that nothing computes with although they may equal a width by chance.
_NO_WIDTHS = frozenset({"layer_idx", "padding_idx", "num_experts", "top_k"})
# Attributes that may be widths even where the hidden size is the same number.
_SURELY_WIDTHS = re.compile(r"intermediate|ffn|inner|expert_dim")

# What modules call the numbers of inputs and outputs of a matrix of theirs.
_INPUTS = ("in_features", "nx", "input_size")
_OUTPUTS = ("out_features", "nf", "output_size")


class _Matrix(NamedTuple):
    """A matrix of a module, or one for each of its experts."""

    name: str  # dotted path of the parameter from the module
    shape: tuple[int, int]  # of one matrix, as it is stored
    experts: int | None  # length of the leading axis; None of a single matrix
    transposed: bool | None  # whether it is stored inputs x outputs; None if nobody says

    def ends(self, transposed: bool) -> tuple[int, int]:
        """Return outputs and inputs."""
        return self.shape[::-1] if transposed else self.shape


class _Roles(NamedTuple):
    """What the matrices of an FFN are; `gate` is `up` where they are one."""

    gate: _Matrix | None
    up: _Matrix
    down: _Matrix
    width: int
    transposed: bool


def ffns_of(block: nn.Module, index: int, hidden: int) -> list[Unit | Refusal]:
    """Return what looks like the FFNs of the block with an index."""
    found: dict[str, Unit | Refusal] = {}
    for path, module in block.named_modules():
        unit = _ffn(module, path, index, hidden)
        if unit is not None:
            found[path] = unit
    # What has an FFN inside is none itself, but the block, which can have one beside.
    outer = {
        path
        for path in found
        if path and any(isinstance(found[p], Unit) for p in found if p.startswith(f"{path}."))
    }
    return [unit for path, unit in found.items() if path not in outer]


def _ffn(module: nn.Module, path: str, index: int, hidden: int) -> Unit | Refusal | None:
    matrices = list(_matrices(module))
    if not 2 <= len(matrices) <= 3 or len({matrix.experts for matrix in matrices}) != 1:
        return None
    experts, roles = matrices[0].experts, _roles(matrices, hidden)
    if roles is None:
        return None
    gate, up, down, width, _ = roles
    # Attention and bottlenecks are cheap to tell from an FFN.
    names = {matrix.name.removesuffix(".weight") for matrix in matrices}
    is_bottleneck = gate is None and experts is None and 2 * width < hidden
    if names == {"query", "key", "value"} or is_bottleneck:
        return None
    axes = _axes(module, roles, hidden)
    if isinstance(axes, str):
        return Refusal(f"{index}.{path}".removesuffix("."), axes)
    prefix = f"{path}." if path else ""

    def tells(name: str, value: int) -> bool:
        # The numbers of a block may be those of its attention.
        is_width = bool(path) and value in (width, 2 * width) and name not in _NO_WIDTHS
        return is_width and (value != hidden or bool(_SURELY_WIDTHS.search(name)))

    return Unit(
        block=index,
        path=path,
        width=width,
        ffns=experts or 1,
        up=prefix + up.name,
        gate=None if gate is None else prefix + gate.name,
        down=prefix + down.name,
        axes={prefix + name: axis for name, axis in axes.items()},
        attributes=tuple(width_attributes(module, path, axes, down.name, width, tells)),
        routed=experts is not None,
    )


def _matrices(module: nn.Module) -> Iterator[_Matrix]:
    for name, parameter in own_parameters(module):
        owner = owner_of(module, name)
        if isinstance(owner, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        first, second = parameter.shape[-2:] if parameter.ndim > 1 else (0, 0)
        if parameter.ndim == 3 and first > 1:
            flag = getattr(module, "is_transposed", None)
            transposed = flag if isinstance(flag, bool) else None
            yield _Matrix(name, (first, second), len(parameter), transposed)
        elif parameter.ndim == 2 and "bias" not in name.rpartition(".")[2]:
            is_known = isinstance(owner, nn.Linear) or is_transposed(owner)
            transposed = is_transposed(owner) if is_known else None
            yield _Matrix(name, (first, second), None, transposed)


def _roles(matrices: list[_Matrix], hidden: int) -> _Roles | None:
    """Return what two or three matrices are to each other; None if they are no FFN."""
    known = {matrix.transposed for matrix in matrices} - {None}
    orders = (bool(known.pop()),) if len(known) == 1 else (False, True)
    for transposed in orders:
        for down in reversed(matrices):
            roles = _roles_with(down, matrices, transposed)
            if roles and (down.ends(transposed)[0] == hidden or down.experts is not None):
                return roles
    return None


def _roles_with(down: _Matrix, matrices: list[_Matrix], transposed: bool) -> _Roles | None:
    outer, width = down.ends(transposed)
    ups = [matrix for matrix in matrices if matrix is not down]
    if any(matrix.ends(transposed)[1] != outer for matrix in ups):
        return None
    widths = [matrix.ends(transposed)[0] for matrix in ups]
    if widths == [width, width]:
        gate, up = sorted(ups, key=lambda matrix: not _sounds_like_gate(matrix.name))
        return _Roles(gate, up, down, width, transposed)
    if widths in ([width], [2 * width]):
        return _Roles(None if widths == [width] else ups[0], ups[0], down, width, transposed)
    return None


def _sounds_like_gate(name: str) -> bool:
    stem = name.removesuffix(".weight").rpartition(".")[2]
    return "gate" in name or stem in ("w1", "wi_0", "linear_1")


def _axes(module: nn.Module, roles: _Roles, hidden: int) -> dict[str, ChannelAxis] | str:
    """Return where the parameters of an FFN have channels, or why that cannot be said."""
    lead, width = int(roles.down.experts is not None), roles.width
    shared = HALVES if getattr(module, "is_concatenated", True) else INTERLEAVED
    out_axis, in_axis = (lead + 1, lead) if roles.transposed else (lead, lead + 1)
    axes = {
        matrix.name: ChannelAxis(out_axis, shared if roles.gate is roles.up else (1,))
        for matrix in (roles.gate, roles.up)
        if matrix is not None
    }
    axes[roles.down.name] = ChannelAxis(in_axis)
    for name, parameter in own_parameters(module):
        lengths = tuple(parameter.shape)[lead:]
        if name in axes or is_bias_of(name, roles.down.name):
            continue
        is_bias = any(matrix and is_bias_of(name, matrix.name) for matrix in (roles.gate, roles.up))
        # Where channels are as many as the hidden size, a norm may be of either.
        if lengths == (hidden,) and not is_bias:
            continue
        if lengths == (width,):
            axes[name] = ChannelAxis(lead)
        elif lengths == (2 * width,):
            axes[name] = ChannelAxis(lead, shared)
        elif width in lengths or 2 * width in lengths:
            return (
                f"matrices: expected no others than gate, up and down, found {name} of shape "
                f"{list(parameter.shape)}"
            )
    return axes


# What FFNs and attention layers have in common: matrices with an axis of channels, or of heads.


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module and of its children that have no children."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if next(child.children(), None) is None:
            for key, parameter in child.named_parameters(recurse=False):
                yield f"{name}.{key}", parameter


def owner_of(module: nn.Module, name: str) -> Any:
    """Return the module whose parameter a dotted path names."""
    return module.get_submodule(name.rpartition(".")[0])


def is_transposed(owner: nn.Module) -> bool:
    """Return whether a module stores its matrix inputs x outputs, as Conv1D of gpt2 does."""
    return hasattr(owner, "nf")


def is_bias_of(name: str, matrix: str) -> bool:
    """Return whether a parameter is the bias of a matrix, by what both are called."""
    stem = matrix.removesuffix("weight")
    return name in (f"{stem}bias", f"{stem.removesuffix('.')}_bias", f"{matrix}_bias")


def width_attributes(
    module: nn.Module,
    path: str,
    axes: Mapping[str, ChannelAxis],
    down: str,
    width: int,
    tells: Callable[[str, int], object],
) -> Iterator[WidthAttribute]:
    """Yield the numbers by which a module at a path of the block, and its matrices, tell the width.

    Whether one of the module's own does, its name and value say.
    """
    for name, axis in axes.items():
        owner = name.rpartition(".")[0]
        if owner and not name.endswith("bias"):
            for size in _INPUTS if name == down else _OUTPUTS:
                if getattr(module.get_submodule(owner), size, None) == axis.entries * width:
                    at = f"{path}.{owner}".removeprefix(".")
                    yield at, size, axis.entries
    for name, value in vars(module).items():
        if type(value) is int and tells(name, value):
            yield path, name, value // width
