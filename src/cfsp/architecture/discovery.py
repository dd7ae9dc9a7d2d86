"""Finding the blocks of a model and their units, by looking at its modules.

The model may be on the meta device: only shapes and names of attributes count. What is found is a
guess, which `cfsp.architecture.proof` proves or refuses. `cfsp.architecture.ffns` finds FFNs.

A KV group is a head of keys and values with the query heads that read it. An attention is a module
with one matrix from its heads back to the hidden size and others from the hidden size to heads:

    output     D x heads
    queries, keys, values, each a matrix or all in one, and gates of heads if there are any

Shapes: D hidden, H query heads, G KV groups, N inputs of the output matrix: all heads side by side.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from cfsp.architecture.ffns import (
    ffns_of,
    is_bias_of,
    is_transposed,
    own_parameters,
    owner_of,
    width_attributes,
)
from cfsp.architecture.found import Architecture, ChannelAxis, Refusal, Unit
from cfsp.errors import UnknownModelError
from cfsp.settings import Part

# Names of classes and modules that mix tokens.
_MIXES = re.compile(
    r"Attention|Attn|Mixer|Mamba|Delta|Recurrent|Rwkv|Retention|ShortConv"
    r"|attention|attn|mixer|mamba|recurrent|temporal_block"
)
_OUTPUT = re.compile(r"(^|\.)(o|o_proj|out|out_proj|out_lin|dense|c_proj|wo|proj|attn_out)(\.|$)")
_HEADS, _GROUPS = "num_attention_heads", "num_key_value_heads"
_OTHER_NAMES = {
    _HEADS: (_HEADS, "num_heads", "n_heads", "n_head"),
    _GROUPS: (_GROUPS, "num_kv_heads", "n_kv_heads"),
}
# Numbers of a module that heads make up, and what may equal one by chance.
_COUNTS = re.compile(r"heads?$|kv")
_LENGTHS = re.compile(r"(dim|size)$")
_NOT_THEM = re.compile(r"^head_|_head_|window|rotary|groups|rope|layer|chunk")


def find_architecture(model: PreTrainedModel, part: Part = "ffn") -> Architecture:
    """Return the blocks of a model and the units of a part that they seem to have.

    With the part `attention` there are also attention layers that can only go whole.
    """
    decoder: nn.Module = model.get_decoder()
    # Some call their output matrix `decoder`.
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model.base_model
    base = next(path for path, module in model.named_modules() if module is decoder)
    text_config: Any = model.config.get_text_config(decoder=True)
    hidden = _first_number(text_config, "hidden_size", "d_model", "n_embd", "dim")
    layers = _first_number(text_config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if hidden is None:
        raise UnknownModelError(
            f"the config of model type {text_config.model_type!r} names no hidden_size"
        )
    candidates: list[tuple[str, nn.ModuleList, list[Unit | Refusal]]] = []
    for path, blocks in decoder.named_modules():
        inside = tuple(f"{outer}." for outer, *_ in candidates)
        if not isinstance(blocks, nn.ModuleList) or path.startswith(inside):
            continue
        found = []
        for index, block in enumerate(blocks):
            if part == "ffn":
                found += ffns_of(block, index, hidden)
            else:
                found += attentions_of(block, index, hidden, text_config, part)
        candidates.append((path, blocks, found))
    if not candidates:
        raise UnknownModelError(
            f"{type(model).__name__} has no list of decoder blocks that cfsp could find; expected "
            "a ModuleList in its text decoder"
        )

    def likelihood(candidate: tuple[str, nn.ModuleList, list[Unit | Refusal]]) -> Any:
        _path, blocks, found = candidate
        has_units = any(isinstance(unit, Unit) for unit in found)
        return len(blocks) == layers, has_units, len(blocks)

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
    )


def _innermost_model(model: PreTrainedModel, blocks: str) -> str:
    """Return the path to the module that takes token ids and calls the blocks."""
    path = blocks
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            break
    return path


def _first_number(text_config: Any, *keys: str) -> int | None:
    values = (getattr(text_config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), None)


# Attentions.


class _Heads(NamedTuple):
    """How the heads of an attention are counted: H, G and N."""

    query: int
    groups: int
    inputs: int


def attentions_of(
    block: nn.Module, index: int, hidden: int, text_config: Any, part: Part
) -> list[Unit | Refusal]:
    """Return the attention layers of a block, and what mixes tokens in another way.

    With the part `attention` those whose heads are not found are there too: they can go whole.
    """
    found: list[Unit | Refusal] = []
    inside: list[str] = []
    for path, module in block.named_modules():
        if not path or path.startswith(tuple(inside)):
            continue
        if not (_MIXES.search(type(module).__name__) or _MIXES.search(path.rpartition(".")[2])):
            continue
        if not any(parameter.ndim > 1 for parameter in module.parameters()):
            continue
        has_inner = any(
            child and _MIXES.search(type(part).__name__)
            for child, part in module.named_modules()
            if next(part.children(), None) is not None
        )
        unit = _attention(module, path, index, hidden, text_config, part)
        if has_inner and (isinstance(unit, str) or unit.is_whole):
            continue  # what is inside it may be one
        found.append(Refusal(f"{index}.{path}", unit) if isinstance(unit, str) else unit)
        inside.append(f"{path}.")
    return found


def _attention(
    module: nn.Module, path: str, index: int, hidden: int, text_config: Any, part: Part
) -> Unit | str:
    """Return the attention that a module is, or why it is none that can lose heads, or go."""
    matrices, output = _matrices(module, hidden)
    if output is None:
        return "heads: expected matrices of queries, keys, values and output, found " + (
            ", ".join(name.removesuffix(".weight") for name, _ in own_parameters(module)) or "none"
        )
    inputs = {name: out for name, (out, into) in matrices.items() if name != output}
    heads = _heads(module, text_config, matrices[output][1], list(inputs.values()))
    odd = [name for name, (_, into) in matrices.items() if name != output and into != hidden]
    whole = _axis(module, output, of_outputs=False, spans=(matrices[output][1],))
    unit = Unit(
        block=index,
        path=path,
        width=1,
        ffns=1,
        up=f"{path}.{max(inputs, key=lambda name: inputs[name], default='')}",
        gate=None,
        down=f"{path}.{output}",
        axes={f"{path}.{output}": whole},
        part="kv",
    )
    # Convolutions and delta nets may have matrices of the same shapes.
    is_called_so = "Attention" in type(module).__name__
    if heads is None or odd or not is_called_so:
        if part == "attention" and inputs and is_called_so:
            return unit
        names = ", ".join(
            f"{name.removesuffix('.weight')} {list(shape)}" for name, shape in matrices.items()
        )
        return f"heads: expected queries, keys and values of whole heads, found {names}"
    axes = dict(_axes(module, output, inputs, heads))
    counts = {_HEADS: heads.query // heads.groups, _GROUPS: 1}
    code = _code_of_forward(type(module))  # type: ignore[arg-type]
    tells = partial(_tells_heads, heads)
    return replace(
        unit,
        width=heads.groups,
        axes={f"{path}.{name}": axis for name, axis in axes.items()},
        attributes=tuple(width_attributes(module, path, axes, output, heads.groups, tells)),
        # What it reads in its config while it runs.
        config_numbers={name: n for name, n in counts.items() if f"self.config.{name}" in code},
    )


def _matrices(module: nn.Module, hidden: int) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return the matrices that have the hidden size, as outputs and inputs, and which is last."""
    matrices: dict[str, tuple[int, int]] = {}
    for name, parameter in own_parameters(module):
        if parameter.ndim == 2 and "bias" not in name and hidden in parameter.shape:
            first, second = parameter.shape
            stored_inputs_first = is_transposed(owner_of(module, name))
            matrices[name] = (second, first) if stored_inputs_first else (first, second)
    outputs = (name for name, (out, _) in matrices.items() if out == hidden)
    return matrices, next((name for name in outputs if _OUTPUT.search(name)), None)


def _heads(module: Any, text_config: Any, inputs: int, widths: list[int]) -> _Heads | None:
    """Return how heads are counted; None if they do not make up the matrices."""

    def counted(name: str) -> list[int]:
        values = []
        for of, other in product((module, text_config), _OTHER_NAMES[name]):
            with suppress(Exception):  # a config that has another number for each block
                values.append(getattr(of, other, None))
        return [value for value in values if type(value) is int and value > 0]

    for query in dict.fromkeys(counted(_HEADS)):
        for groups in dict.fromkeys([*counted(_GROUPS), query]):
            if inputs % query or query % groups:
                continue
            heads = _Heads(query, groups, inputs)
            size = inputs // query
            if len(widths) == 1 and widths[0] == (query + 2 * groups) * size:
                return heads
            if len(widths) >= 3 and all(width % groups == 0 for width in widths):
                of_groups = [width for width in widths if width < inputs or query == groups]
                if len(of_groups) >= 2 and max(widths) >= inputs // 2:
                    return heads
    return None


def _axes(
    module: nn.Module, output: str, inputs: dict[str, int], heads: _Heads
) -> Iterator[tuple[str, ChannelAxis]]:
    """Yield where the parameters of an attention have KV groups."""
    size, each = heads.inputs // heads.query, heads.inputs // heads.groups

    def spans(length: int) -> tuple[int, ...]:
        return (each, size, size) if len(inputs) == 1 else (length // heads.groups,)

    for name, parameter in own_parameters(module):
        of = next((other for other in inputs if is_bias_of(name, other)), None)
        if name == output:
            yield name, _axis(module, name, of_outputs=False, spans=(each,))
        elif name in inputs:
            yield name, _axis(module, name, of_outputs=True, spans=spans(inputs[name]))
        elif of is not None:
            yield name, ChannelAxis(0, spans=spans(inputs[of]))
        elif (
            name.startswith(output.removesuffix("weight"))
            or is_bias_of(name, output)
            or parameter.ndim not in (1, 2)
        ):
            continue
        # Norms of heads that each have weights of their own, and sinks.
        elif parameter.ndim == 2 and parameter.shape[0] in (heads.query, heads.groups):
            yield name, ChannelAxis(0, spans=(parameter.shape[0] // heads.groups,))
        elif (
            parameter.ndim == 1
            and len(parameter) in (heads.query, heads.inputs)
            and "norm" not in name
        ):
            yield name, ChannelAxis(0, spans=(len(parameter) // heads.groups,))


def _axis(module: nn.Module, name: str, *, of_outputs: bool, spans: tuple[int, ...]) -> ChannelAxis:
    """Return the axis of a matrix that its outputs or its inputs lie along."""
    return ChannelAxis(int(of_outputs == is_transposed(owner_of(module, name))), spans=spans)


def _tells_heads(heads: _Heads, name: str, value: int) -> bool:
    """Return whether a number of an attention's own module tells how many heads there are."""
    lengths = heads.inputs, heads.inputs // heads.query * heads.groups
    is_count = _COUNTS.search(name) and value in (heads.query, heads.groups)
    tells = is_count or (_LENGTHS.search(name) and value in lengths)
    return bool(tells) and not _NOT_THEM.search(name)


@cache
def _code_of_forward(module_class: type[nn.Module]) -> str:
    """Return the source from the forward on; to find it, all of its file is parsed."""
    return inspect.getsource(module_class).partition("def forward")[2]
