"""The proof, by execution, that the FFN units of a model are what discovery takes them for.

A small random model of the same class runs on a few tokens. For one unit of every kind:

    alone        none of its parameters is also used elsewhere
    bites        with half of the channels masked, the block computes something else
    cut          with the same channels cut out, it computes what it computes with them masked
    untouched    cutting replaces the parameters of the unit and no other
    neighbours   the blocks before and after compute what they did
    watched      its activations are seen while the block runs, and of which token each is

and for the blocks:

    order        the decoder calls each once, in order, each on the output of the one before
    replay       a block that is called again as the decoder called it computes the same

Masked is a channel whose column of down is zero, which is the same as a zero at its input.

Shapes: B windows, T tokens, D hidden, F channels, E experts, K kept channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture, FFNUnit, Fusion, Refusal
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.resizing import resize_ffn
from cfsp.architecture.small_run import SmallRun, first_line, run_small, set_parameter
from cfsp.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = 1e-5
# A mask that changes less than this proves nothing: cut and masked would agree by chance.
LEAST_EFFECT = 1e-3


@torch.no_grad()
def prove(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> Architecture:
    """Return the blocks of a config's model and those of its FFN units that can be cut.

    Args:
        config: of the model as it is; not changed.
        model_class: what is built from it; by default that of `model_class_of`.

    Raises:
        CheckpointError: no model can be built from the config.
        UnsupportedModelError: the model has no blocks that can be run one by one, or no FFN unit
            that can be cut.
    """
    model_class = model_class or model_class_of(config)
    architecture, shared = _guess(config, model_class)
    alone, refused = _split(architecture, shared)
    if not alone:
        raise _unsupported(architecture, refused)
    run = run_small(config, model_class, architecture)
    verdicts: dict[tuple[object, ...], FFNUnit | Refusal] = {}
    units: list[FFNUnit] = []
    for number in alone:
        unit, small = architecture.units[number], run.architecture.units[number]
        kind = (unit.kind, _conduct(run.blocks[unit.block], small))
        if kind not in verdicts:
            verdicts[kind] = _prove_unit(run, small)
        verdict = verdicts[kind]
        if isinstance(verdict, Refusal):
            refused.append(Refusal(architecture.module_name(unit), verdict.reason))
        else:
            units.append(unit.as_fused_as(verdict))
    if not units:
        raise _unsupported(architecture, refused)
    return replace(architecture, units=tuple(units), refused=tuple(refused))


def _split(
    architecture: Architecture, shared: dict[str, list[str]]
) -> tuple[list[int], list[Refusal]]:
    """Return the numbers of the units whose weights are theirs alone, and the refusals so far."""
    alone: list[int] = []
    refused = list(architecture.refused)
    for number, unit in enumerate(architecture.units):
        names = [architecture.block_prefix(unit.block) + name for name in unit.axes]
        elsewhere = next((name for name in names if name in shared), None)
        if elsewhere is None:
            alone.append(number)
        else:
            reason = (
                f"alone: expected weights that are used nowhere else, found that {elsewhere} is "
                f"{shared[elsewhere][0]} too"
            )
            refused.append(Refusal(architecture.module_name(unit), reason))
    return alone, refused


def _conduct(block: nn.Module, unit: FFNUnit) -> tuple[object, ...]:
    """Return what may make two units of a kind compute in different ways: types and numbers."""
    module = block.get_submodule(unit.path)
    return tuple(
        (type(part), *sorted((k, v) for k, v in vars(part).items() if _may_matter(k, v)))
        for part in (block, *module.modules())
    )


def _may_matter(name: str, value: object) -> bool:
    is_plain = type(value) in (bool, int, float, str)
    return is_plain and not name.endswith(("idx", "index", "_id", "_number"))


def _unsupported(architecture: Architecture, refused: list[Refusal]) -> UnsupportedModelError:
    if not refused:
        return UnsupportedModelError(
            f"{architecture.class_name} has no FFN in its {architecture.block_count} blocks "
            f"{architecture.blocks} that cfsp could find; expected modules whose matrices lead "
            "from the hidden size to channels and back; if it has some, please report the model "
            "type"
        )
    first = refused[0]
    return UnsupportedModelError(
        f"no FFN of {architecture.class_name} can be cut: {first.module} failed the check "
        f"{first.reason}; please report the model type with this sentence"
    )


def _guess(config: PreTrainedConfig, model_class: Any) -> tuple[Architecture, dict[str, list[str]]]:
    """Return what discovery finds, and for every shared parameter its other names."""
    try:
        with torch.device("meta"):
            model = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # whatever a config's numbers and names make transformers do
        raise CheckpointError(
            f"no {config.model_type} model can be built from the numbers and names in config.json "
            f"({first_line(error)}); correct it or download it again"
        ) from error
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: [other for other in group if other != name]
        for group in names.values()
        if len(group) > 1
        for name in group
    }
    return find_architecture(model), shared


def _prove_unit(run: SmallRun, unit: FFNUnit) -> FFNUnit | Refusal:
    """Return the unit with its fusion settled, or which check it failed."""
    module = run.architecture.module_name(unit)
    call = run.calls[unit.block]
    if not (error := _difference(run.output(unit.block), call.output)) <= TOLERANCE:
        return Refusal(
            module, f"replay: expected the same output again, found a difference of {error:.1e}"
        )
    kept_EK = _random_half(unit)
    masked = _masked_output(run, unit, kept_EK)
    if not (effect := _difference(masked, call.output)) > LEAST_EFFECT:
        return Refusal(
            module,
            f"bites: expected another output with half of the channels masked, found a difference "
            f"of {effect:.1e}",
        )
    verdict: FFNUnit | Refusal = unit
    for candidate in _candidates(unit):
        reason = _cut_fails(run, candidate, kept_EK, masked)
        if reason is None:
            reason = _watching_fails(run, candidate)
            return candidate if reason is None else Refusal(module, reason)
        verdict = Refusal(module, reason)
    return verdict


def _watching_fails(run: SmallRun, unit: FFNUnit) -> str | None:
    """Return why the activations of a unit cannot be gathered; None if they can."""
    block = run.blocks[unit.block]
    try:
        with observed_activations(block, [unit], lambda *rows: None):
            run.output(unit.block)
    except UnsupportedModelError as error:
        return f"watched: expected to see its activations, found that {error}"
    return None


def _candidates(unit: FFNUnit) -> Iterator[FFNUnit]:
    yield unit
    if unit.is_fused:
        other: Fusion = "interleaved" if unit.axes[unit.up].fusion == "halves" else "halves"
        yield unit.with_fusion(other)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _random_half(unit: FFNUnit) -> list[list[int]]:
    """Return channels to keep of each FFN, in ascending order (E lists of K)."""
    generator = torch.Generator().manual_seed(unit.width)
    half = max(1, unit.width // 2)
    return [
        torch.randperm(unit.width, generator=generator)[:half].sort().values.tolist()
        for _ in range(unit.ffns)
    ]


def _masked_output(run: SmallRun, unit: FFNUnit, kept_EK: list[list[int]]) -> Tensor:
    """Return the block's output with zeros in the columns of down that are not kept."""
    block = run.blocks[unit.block]
    down = block.get_parameter(unit.down)
    axis = unit.axes[unit.down].axis
    masked = torch.zeros_like(down)
    # A single matrix has no axis of experts.
    lead = down.ndim - 2
    for ffn, kept in enumerate(kept_EK):
        new, old = (masked[ffn], down[ffn]) if lead else (masked, down)
        index = torch.tensor(kept)
        new.index_copy_(axis - lead, index, old.index_select(axis - lead, index))
    set_parameter(block, unit.down, nn.Parameter(masked, requires_grad=False))
    output = run.output(unit.block)
    set_parameter(block, unit.down, down)
    return output


def _cut_fails(
    run: SmallRun, unit: FFNUnit, kept_EK: list[list[int]], masked: Tensor
) -> str | None:
    """Return which check a unit fails when it is cut, what was expected and what found."""
    before = _tensors(run.model)
    with _cut(run.blocks[unit.block], unit, kept_EK):
        after = _tensors(run.model)
        prefix = run.architecture.block_prefix(unit.block)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        if changed != {prefix + name for name in unit.axes}:
            odd = sorted(changed ^ {prefix + name for name in unit.axes})
            return f"untouched: expected that only its own parameters change, found {odd[0]}"
        try:
            error = _difference(run.output(unit.block), masked)
        except Exception as problem:
            return f"cut: expected the output with masked channels, found {first_line(problem)}"
        if not error <= TOLERANCE:
            return (
                "cut: expected the output with masked channels, found a relative difference of "
                f"{error:.1e}"
            )
        for neighbour in (unit.block - 1, unit.block + 1):
            if 0 <= neighbour < len(run.blocks):
                error = _difference(run.output(neighbour), run.calls[neighbour].output)
                if not error <= TOLERANCE:
                    return (
                        f"neighbours: expected the same output of block {neighbour}, found a "
                        f"relative difference of {error:.1e}"
                    )
    return None


def _tensors(model: nn.Module) -> dict[str, int]:
    """Return which tensor stands under every name."""
    return {
        name: id(tensor)
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }


@contextmanager
def _cut(block: nn.Module, unit: FFNUnit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Cut all but the kept channels of a unit out of its block; put them back afterwards."""
    originals = {name: block.get_parameter(name) for name in unit.axes}
    resize_ffn(block, len(kept_EK[0]), unit.plain_axes, unit.plain_attributes)
    try:
        for name, original in originals.items():
            block.get_parameter(name).copy_(unit.select(name, original, kept_EK))
        yield
    finally:
        resize_ffn(block, unit.width, unit.plain_axes, unit.plain_attributes)
        for name, original in originals.items():
            set_parameter(block, name, original)
