"""The proof, by execution, that the units of a model are what discovery takes them for.

A small random model of the same class runs on a few tokens. For one unit of every kind:

    alone        none of its parameters is also used elsewhere
    bites        with half of the channels masked, the block computes something else
    cut          with the same channels cut out, it computes what it computes with them masked, and
                 so with the other half
    untouched    cutting replaces the parameters of the unit and no other
    neighbours   the blocks before and after compute what they did
    watched      its activations are seen while the block runs, and of which token each is
    whole        of attention: the whole decoder computes with the groups cut out what it computes
                 with them masked, so that no other block reads its keys and values

and for the blocks:

    order        the decoder calls each once, in order, each on the output of the one before
    replay       a block that is called again as the decoder called it computes the same

Masked is a channel whose columns of down are zero, which is the same as zeros at its input. The
channels of an attention are its KV groups.

Shapes: B windows, T tokens, D hidden, F channels, E experts, K kept channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.experts import why_not, with_experts
from cfsp.architecture.found import Architecture, Fusion, Refusal, Unit
from cfsp.architecture.model_classes import build_model, model_class_of
from cfsp.architecture.resizing import resize_attention, resize_ffn
from cfsp.architecture.small_run import (
    LEAST_EFFECT,
    TOLERANCE,
    SmallRun,
    difference,
    run_small,
    set_parameter,
)
from cfsp.errors import UnsupportedModelError, first_line
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, Part, unit_parts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@torch.no_grad()
def prove(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None = None,
    parts: tuple[Part, ...] = DEFAULT_PARTS,
) -> Architecture:
    """Return the blocks of a config's model and those of its units that can be cut.

    Args:
        config: of the model as it is; not changed.
        model_class: what is built from it; by default that of `model_class_of`.
        parts: whose units must be there. FFNs are found in any case.

    Raises:
        CheckpointError: no model can be built from the config.
        UnsupportedModelError: the model has no blocks that can be run one by one, or no unit of a
            part that can be cut.
    """
    model_class = model_class or model_class_of(config)
    proved = []
    for part in UNIT_PARTS:
        if part in (*unit_parts(parts), "ffn"):
            try:
                goes_whole = part == "kv" and "attention" in parts
                found = _prove_part(config, model_class, "attention" if goes_whole else part)
                proved.append(found)
            except UnsupportedModelError:
                # Where only blocks go, FFNs are what they are known by.
                if part != "ffn" or part in parts or not set(parts) & set(UNIT_PARTS):
                    raise
    # Attention comes before the FFN, or beside it.
    units = sorted(
        (unit for found in reversed(proved) for unit in found.units), key=lambda unit: unit.block
    )
    refused = tuple(refusal for found in proved for refusal in found.refused)
    architecture = replace(proved[0], units=tuple(units), refused=refused)
    if "experts" not in parts:
        return architecture
    return with_experts(architecture, config, small_run_of(config, model_class))


def _prove_part(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], part: Part
) -> Architecture:
    """Return the blocks and the units of one part that can be cut.

    With `attention` an attention whose KV groups can't be cut is one that can go whole.
    """
    architecture, shared = _guess(config, model_class, part)
    alone, refused = _split(architecture, shared)
    if not alone:
        raise _unsupported(architecture, refused, part)
    run = run_small(config, model_class, architecture, part)
    verdicts: dict[tuple[object, ...], Unit | Refusal] = {}
    units: list[Unit] = []
    for number in alone:
        unit, small = architecture.units[number], run.architecture.units[number]
        kind = (unit.kind, _conduct(run.blocks[unit.block], small))
        if kind not in verdicts:
            verdicts[kind] = _prove_unit(run, small, part)
            if isinstance(verdicts[kind], Refusal) and part == "attention":
                verdicts[kind] = _prove_unit(run, small.whole(), part)
        verdict = verdicts[kind]
        if isinstance(verdict, Refusal):
            refused.append(Refusal(architecture.module_name(unit), verdict.reason))
        else:
            fused = unit.whole() if verdict.is_whole else unit.as_fused_as(verdict)
            units.append(replace(fused, after=verdict.after, extras=verdict.extras))
    if not units:
        raise _unsupported(architecture, refused, part)
    return replace(architecture, units=tuple(units), refused=tuple(refused))


def run_without_verdict(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> SmallRun:
    """Return a small model of a config that ran once, whatever its FFN units are.

    Raises:
        CheckpointError: no model can be built from the config.
        UnsupportedModelError: no small model runs.
    """
    architecture, _ = _guess(config, model_class, "ffn")
    return run_small(config, model_class, architecture)


# Of one command, which asks about one set of blocks or experts after the other.
_small_runs: dict[str, SmallRun] = {}


def small_run_of(
    stock: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> SmallRun:
    """Return what `run_without_verdict` does; the last one is kept."""
    key = f"{type(stock).__name__} {stock.to_json_string(use_diff=False)}"
    if key not in _small_runs:
        _small_runs.clear()
        _small_runs[key] = run_without_verdict(stock, model_class or model_class_of(stock))
    return _small_runs[key]


def why_not_experts(stock: PreTrainedConfig, architecture: Architecture, count: int) -> str | None:
    """Return why a model does not run with so many experts in every block; None if it does.

    Args:
        stock: config of the model.
        architecture: of the model, with what has the axis of experts.
        count: how many.
    """
    return why_not(architecture, small_run_of(stock), count)


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


def _conduct(block: nn.Module, unit: Unit) -> tuple[object, ...]:
    """Return what may make two units of a kind compute in different ways: types and numbers."""
    module = block.get_submodule(unit.path)
    return tuple(
        (type(part), *sorted((k, v) for k, v in vars(part).items() if may_matter(k, v)))
        for part in (block, *module.modules())
    )


def may_matter(name: str, value: object) -> bool:
    """Return whether an attribute of a module may change what it computes, by name and value."""
    is_plain = type(value) in (bool, int, float, str)
    return is_plain and not name.endswith(("idx", "index", "_id", "_number"))


def _unsupported(
    architecture: Architecture, refused: list[Refusal], part: Part
) -> UnsupportedModelError:
    if part != "ffn":
        found = f"{refused[0].module} failed the check {refused[0].reason}" if refused else "none"
        what = "lose KV groups" if part == "kv" else "go"
        return UnsupportedModelError(
            f"no attention of {architecture.class_name} can {what}: {found}; prune it "
            f"without the part {part}"
        )
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


def _guess(
    config: PreTrainedConfig, model_class: Any, part: Part
) -> tuple[Architecture, dict[str, list[str]]]:
    """Return what discovery finds, and for every shared parameter its other names."""
    with torch.device("meta"):
        model = build_model(model_class, config, torch.float32)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: [other for other in group if other != name]
        for group in names.values()
        if len(group) > 1
        for name in group
    }
    return find_architecture(model, part), shared


def _prove_unit(run: SmallRun, unit: Unit, part: Part) -> Unit | Refusal:
    """Return the unit with its fusion settled, or which check it failed."""
    module = run.architecture.module_name(unit)
    if unit.part == "kv" and unit.width == 1 and part == "kv":
        return Refusal(module, "heads: expected two KV groups or more, found one")
    call = run.calls[unit.block]
    if not (error := difference(run.output(unit.block), call.output)) <= TOLERANCE:
        return Refusal(
            module, f"replay: expected the same output again, found a difference of {error:.1e}"
        )
    if unit.part == "kv" and unit.width == 1:
        # Nothing of it can go but all, which `cfsp.engine.block_proof` proves.
        reason = _watching_fails(run, unit)
        return _as_entered(run, unit.whole()) if reason is None else Refusal(module, reason)
    # Each half of the channels in its turn: one channel may act on all others, as the largest does
    # where activations are quantised.
    halves = [(kept_EK, _masked_output(run, unit, kept_EK)) for kept_EK in _random_halves(unit)]
    kept_EK, masked = halves[0]
    if not (effect := difference(masked, call.output)) > LEAST_EFFECT:
        return Refusal(
            module,
            f"bites: expected another output with half of the channels masked, found a difference "
            f"of {effect:.1e}",
        )
    verdict: Unit | Refusal = unit
    for candidate in _candidates(unit):
        failures = (_cut_fails(run, candidate, *half) for half in halves)
        reason = next((reason for reason in failures if reason is not None), None)
        if reason is None:
            reason = _watching_fails(run, candidate) or _elsewhere_fails(run, candidate, kept_EK)
            if reason is not None:
                return Refusal(module, reason)
            return _as_entered(run, candidate)
        verdict = Refusal(module, reason)
    return verdict


def _watching_fails(run: SmallRun, unit: Unit) -> str | None:
    """Return why the activations of a unit cannot be gathered; None if they can."""
    block = run.blocks[unit.block]
    try:
        with observed_activations(block, [unit], lambda *rows: None):
            run.output(unit.block)
    except UnsupportedModelError as error:
        return f"watched: expected to see its activations, found that {error}"
    return None


def _elsewhere_fails(run: SmallRun, unit: Unit, kept_EK: list[list[int]]) -> str | None:
    """Return why another block depends on an attention's keys and values; None if none does."""
    if unit.part != "kv":
        return None
    masked = _masked_output(run, unit, kept_EK, run.decoder_output)
    with _cut(run.blocks[unit.block], unit, kept_EK):
        try:
            error = difference(run.decoder_output(), masked)
        except Exception as problem:
            found = first_line(problem)
            return f"whole: expected the decoder's output with masked groups, found {found}"
    if not error <= TOLERANCE:
        return (
            "whole: expected the decoder's output with masked groups, found a relative difference "
            f"of {error:.1e}"
        )
    return None


def _as_entered(run: SmallRun, unit: Unit) -> Unit:
    """Return an attention with what it returns, and the module that is entered after it.

    With an output matrix of zeros nothing is added to the hidden state, so that it enters that
    module as it entered the block.
    """
    if unit.part != "kv":
        return unit
    block = run.blocks[unit.block]
    bias = f"{unit.down.removesuffix('weight')}bias"
    zeroed = {
        name: parameter for name, parameter in block.named_parameters() if name in (unit.down, bias)
    }
    hidden = run.calls[unit.block].hidden
    found: list[str] = []
    ran: list[Any] = []

    def before(path: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if ran and inputs and inputs[0].shape == hidden.shape and torch.equal(inputs[0], hidden):
            found.append(path)

    attention = block.get_submodule(unit.path)
    hooks = [attention.register_forward_hook(lambda _module, _args, output: ran.append(output))]
    for path, module in block.named_modules():
        if path and not f"{path}.".startswith(f"{unit.path}."):
            before_this = partial(before, path)
            hooks.append(module.register_forward_pre_hook(before_this, with_kwargs=True))
    for name, parameter in zeroed.items():
        zeros = nn.Parameter(torch.zeros_like(parameter), requires_grad=False)
        set_parameter(block, name, zeros)
    try:
        run.output(unit.block)
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in zeroed.items():
            set_parameter(block, name, parameter)
    extras = len(ran[0]) - 1 if isinstance(ran[0], tuple | list) else None
    return replace(unit, after=found[0] if found else None, extras=extras)


def _candidates(unit: Unit) -> Iterator[Unit]:
    yield unit
    if unit.part == "kv":
        if unit.is_fused:
            yield unit.in_one_section()
    elif unit.is_fused:
        other: Fusion = "interleaved" if unit.axes[unit.up].fusion == "halves" else "halves"
        yield unit.with_fusion(other)


def _random_halves(unit: Unit) -> list[list[list[int]]]:
    """Return channels to keep of each FFN and all others, in ascending order (2 x E lists of K)."""
    generator = torch.Generator().manual_seed(unit.width)
    half = max(1, unit.width // 2)
    order_EF = [torch.randperm(unit.width, generator=generator) for _ in range(unit.ffns)]
    return [
        [order_F[part].sort().values.tolist() for order_F in order_EF]
        for part in (slice(half), slice(half, None))
    ]


def _masked_output(
    run: SmallRun,
    unit: Unit,
    kept_EK: list[list[int]],
    compute: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return the block's output with zeros in the columns of down that are not kept.

    Args:
        run: the small model.
        unit: one of its units.
        kept_EK: channels of each FFN.
        compute: gives what to return instead.
    """
    block = run.blocks[unit.block]
    down = block.get_parameter(unit.down)
    axis = unit.axes[unit.down].axis
    masked = torch.zeros_like(down)
    # A single matrix has no axis of experts.
    lead = down.ndim - 2
    for ffn, kept in enumerate(kept_EK):
        new, old = (masked[ffn], down[ffn]) if lead else (masked, down)
        index = torch.tensor(unit.columns_of(kept))
        new.index_copy_(axis - lead, index, old.index_select(axis - lead, index))
    set_parameter(block, unit.down, nn.Parameter(masked, requires_grad=False))
    output = run.output(unit.block) if compute is None else compute()
    set_parameter(block, unit.down, down)
    return output


def _cut_fails(run: SmallRun, unit: Unit, kept_EK: list[list[int]], masked: Tensor) -> str | None:
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
            error = difference(run.output(unit.block), masked)
        except Exception as problem:
            return f"cut: expected the output with masked channels, found {first_line(problem)}"
        if not error <= TOLERANCE:
            return (
                "cut: expected the output with masked channels, found a relative difference of "
                f"{error:.1e}"
            )
        for neighbour in (unit.block - 1, unit.block + 1):
            if 0 <= neighbour < len(run.blocks):
                error = difference(run.output(neighbour), run.calls[neighbour].output)
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
def _cut(block: nn.Module, unit: Unit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Cut all but the kept channels of a unit out of its block; put them back afterwards."""
    originals = {name: block.get_parameter(name) for name in unit.axes}
    module: Any = block.get_submodule(unit.path)
    config = getattr(module, "config", None)
    _resize(block, unit, len(kept_EK[0]))
    try:
        for name, original in originals.items():
            block.get_parameter(name).copy_(unit.select(name, original, kept_EK))
        yield
    finally:
        _resize(block, unit, unit.width)
        if unit.config_numbers:
            module.config = config
        for name, original in originals.items():
            set_parameter(block, name, original)


def _resize(block: nn.Module, unit: Unit, width: int) -> None:
    """Give a unit another width."""
    if unit.part == "kv":
        numbers = dict(unit.config_numbers)
        axes, attributes = unit.plain_axes, unit.plain_attributes
        resize_attention(block, unit.path, width, axes, attributes, numbers)
    else:
        resize_ffn(block, width, unit.plain_axes, unit.plain_attributes)
