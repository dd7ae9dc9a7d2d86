"""The matrices of a module, and the numbers that tell how large they are.

An FFN and an attention are both a module whose matrices have an axis in common: channels, or heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from cfsp.architecture.found import ChannelAxis, WidthAttribute

# What modules call the numbers of inputs and outputs of a matrix of theirs.
_INPUTS = ("in_features", "nx", "input_size")
_OUTPUTS = ("out_features", "nf", "output_size")


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


def sizes_of_matrices(
    module: nn.Module, path: str, axes: Mapping[str, ChannelAxis], down: str, width: int
) -> Iterator[WidthAttribute]:
    """Yield the numbers by which the children of a module at a path of the block tell the width."""
    for name, axis in axes.items():
        owner = name.rpartition(".")[0]
        if owner and not name.endswith("bias"):
            for size in _INPUTS if name == down else _OUTPUTS:
                if getattr(module.get_submodule(owner), size, None) == axis.entries * width:
                    at = f"{path}.{owner}".removeprefix(".")
                    yield at, size, axis.entries


def own_numbers(
    module: nn.Module, path: str, width: int, tells: Callable[[str, int], object]
) -> Iterator[WidthAttribute]:
    """Yield the numbers of a module that tell its width, by their names and values."""
    for name, value in vars(module).items():
        if type(value) is int and tells(name, value):
            yield path, name, value // width
