"""The proof, by execution, that the FFN units of a model are what discovery takes them for.

A small random model of the same class runs on a few tokens. For one unit of every kind:

    alone        none of its parameters is also used elsewhere
    bites        with half of the channels masked, the block computes something else
    cut          with the same channels cut out, it computes what it computes with them masked
    untouched    cutting replaces the parameters of the unit and no other
    neighbours   the blocks before and after compute what they did

and for the blocks:

    order        the decoder calls each once, in order, each on the output of the one before
    replay       a block that is called again as the decoder called it computes the same

Masked is a channel whose column of down is zero, which is the same as a zero at its input.

Shapes: B windows, T tokens, D hidden, F channels, E experts, K kept channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture, FFNUnit, Fusion, Refusal
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.resizing import resize_ffn
from cfsp.architecture.shrinking import smaller_configs
from cfsp.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = 1e-5
# A mask that changes less than this proves nothing: cut and masked would agree by chance.
LEAST_EFFECT = 1e-3
TOKENS = 12
LEAST_CHANNELS = 8
MOST_BYTES = 2_000_000_000


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
    if not architecture.units:
        raise _unsupported(architecture)
    alone, refused = _split(architecture, shared)
    run = _small_run(config, model_class, architecture) if alone else None
    verdicts: dict[tuple[object, ...], FFNUnit | Refusal] = {}
    units: list[FFNUnit] = []
    for number in alone:
        assert run is not None
        unit, small = architecture.units[number], run.architecture.units[number]
        kind = (unit.kind, _conduct(run.blocks[unit.block], small))
        if kind not in verdicts:
            verdicts[kind] = _prove_unit(run, small)
        verdict = verdicts[kind]
        if isinstance(verdict, Refusal):
            refused.append(Refusal(architecture.module_name(unit), verdict.reason))
        else:
            units.append(unit.as_fused_as(verdict))
    proved = replace(architecture, units=tuple(units), refused=tuple(refused))
    if not units:
        raise _unsupported(proved)
    return proved


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
    is_plain = type(value) in (bool, int, float)
    return is_plain and "layer" not in name and not name.endswith(("idx", "index", "_id"))


def _unsupported(architecture: Architecture) -> UnsupportedModelError:
    if not architecture.refused:
        return UnsupportedModelError(
            f"{architecture.class_name} has no FFN in its {architecture.block_count} blocks "
            f"{architecture.blocks} that cfsp could find; expected modules whose matrices lead "
            "from the hidden size to channels and back; if it has some, please report the model "
            "type"
        )
    first = architecture.refused[0]
    return UnsupportedModelError(
        f"no FFN of {architecture.class_name} can be cut: {first.module} failed the check "
        f"{first.reason}; please report the model type with this sentence"
    )


def _guess(config: PreTrainedConfig, model_class: Any) -> tuple[Architecture, dict[str, list[str]]]:
    """Return what discovery finds, and for every shared parameter its other names."""
    import copy

    try:
        with torch.device("meta"):
            model = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # whatever a config's numbers and names make transformers do
        raise CheckpointError(
            f"no {config.model_type} model can be built from the numbers and names in config.json "
            f"({_first_line(error)}); correct it or download it again"
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


@dataclass(frozen=True)
class _Call:
    """How the decoder called a block, and what came out.

    Attributes:
        block: index.
        args: all arguments, the hidden state among them.
        kwargs: likewise.
        hidden: the hidden state that went in.
        output: the hidden state that came out.
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    output: Tensor


@dataclass(frozen=True)
class _Run:
    """A small model that ran once.

    Attributes:
        architecture: of the small model.
        model: with weights in its text decoder only.
        blocks: of the decoder.
        calls: one for each block.
    """

    architecture: Architecture
    model: nn.Module
    blocks: nn.ModuleList
    calls: tuple[_Call, ...]

    def output(self, block: int) -> Tensor:
        """Return what a block computes when it is called as in the run."""
        call = self.calls[block]
        return _first_tensor(self.blocks[block](*_copied(call.args), **_copied(call.kwargs)))


def _small_run(config: PreTrainedConfig, model_class: Any, architecture: Architecture) -> _Run:
    """Run the smallest model that has the units of the large one.

    Raises:
        UnsupportedModelError: none of them runs, or not block by block.
    """
    reason = "none has the same FFNs at the same places"
    for smaller in smaller_configs(config):
        try:
            model = _skeleton(smaller, model_class)
            found = find_architecture(model)
            if not _same_units(found, architecture):
                continue
            if _fill_decoder(model, found) is None:
                reason = f"a block takes more than {MOST_BYTES / 1e9:.0f} GB"
                continue
            calls = _record(model, found)
        except UnsupportedModelError:
            raise
        except Exception as error:  # a size that does not fit the others: try the next one
            reason = _first_line(error)
            continue
        blocks = model.get_submodule(found.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return _Run(found, model, blocks, calls)
    raise UnsupportedModelError(
        f"the decoder of {architecture.class_name} could not be tried on random weights "
        f"({reason}); please report the model type with this sentence"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _skeleton(config: PreTrainedConfig, model_class: Any) -> Any:
    """Return a model with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights

    # The plain loop over experts is the one that takes any width.
    config._experts_implementation = "eager"
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _same_units(small: Architecture, large: Architecture) -> bool:
    """Return whether two models have units of the same form at the same places."""
    places = (small.blocks, small.block_count) == (large.blocks, large.block_count)
    return (
        places
        and len(small.units) == len(large.units)
        and all(
            (mine.block, mine.form, mine.ffns) == (other.block, other.form, other.ffns)
            and mine.width >= min(other.width, LEAST_CHANNELS)
            for mine, other in zip(small.units, large.units, strict=True)
        )
    )


def _fill_decoder(model: nn.Module, architecture: Architecture) -> int | None:
    """Give the text decoder random weights; return their bytes, or None if they are too many.

    Blocks that are built alike share theirs, as if they had been trained to be the same.
    """
    decoder = model.get_submodule(architecture.decoder)
    blocks = decoder.get_submodule(_inside(architecture.blocks, architecture.decoder))
    of_blocks = {id(parameter) for parameter in blocks.parameters()}
    alike: dict[tuple[object, ...], nn.Module] = {}
    for block in blocks.children():
        alike.setdefault(_build(block), block)
    own = [p for p in decoder.parameters() if id(p) not in of_blocks]
    parts = [*own, *(p for block in alike.values() for p in block.parameters())]
    size = 4 * sum(parameter.numel() for parameter in {id(p): p for p in parts}.values())
    if size > MOST_BYTES:
        return None
    generator = torch.Generator().manual_seed(0)
    for owner in (decoder, *alike.values()):
        for name, parameter in list(owner.named_parameters()):
            if parameter.is_meta and (owner is not decoder or id(parameter) not in of_blocks):
                _set_parameter(owner, name, _random(name, parameter, generator))
    for block in blocks.children():
        for name, parameter in alike[_build(block)].named_parameters():
            _set_parameter(block, name, parameter)
    return size


def _inside(path: str, outer: str) -> str:
    return path.removeprefix(f"{outer}.") if outer else path


def _build(block: nn.Module) -> tuple[object, ...]:
    """Return what two blocks have in common that can have the same weights."""
    kinds = [(name, type(module)) for name, module in block.named_modules()]
    shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
    return (*kinds, *shapes)


def _set_parameter(module: nn.Module, path: str, parameter: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, parameter)


def _random(name: str, parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Return weights of the size that a trained model has: norms about 1, sums kept in bounds."""
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
        values *= parameter.shape[-1] ** -0.5
    else:
        values *= 0.1
        if re.search(r"norm|ln_|ln\d|gamma", name) and name.endswith("weight"):
            values += 1
    return nn.Parameter(values, requires_grad=False)


def _record(model: Any, architecture: Architecture) -> tuple[_Call, ...]:
    """Run the decoder on a few tokens; return how it called each block.

    Raises:
        UnsupportedModelError: it does not call them one after the other.
    """
    decoder: Any = model.get_submodule(architecture.decoder)
    blocks: Any = model.get_submodule(architecture.blocks)
    calls: list[_Call] = []
    pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending.append((_copied(args), _copied(kwargs)))

    def after(index: int, output: Any) -> None:
        args, kwargs = pending.pop()
        hidden = _first_tensor(kwargs.get("hidden_states", args or tuple(kwargs.values())))
        calls.append(_Call(index, args, kwargs, hidden, _first_tensor(output).clone()))

    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(
            block.register_forward_hook(
                lambda _block, _args, output, index=index: after(index, output)
            )
        )
    try:
        tokens_BT = (
            torch.randint(3, 200, (2, TOKENS), generator=torch.Generator().manual_seed(1))
            % model.config.get_text_config(decoder=True).vocab_size
        )
        decoder(input_ids=tokens_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    _check_order(architecture, calls)
    return tuple(calls)


def _check_order(architecture: Architecture, calls: list[_Call]) -> None:
    found = Counter(call.block for call in calls)
    odd = [index for index in range(architecture.block_count) if found[index] != 1]
    place = f"{architecture.class_name}: {architecture.blocks}"
    please = "; please report the model type with this sentence"
    if odd:
        raise UnsupportedModelError(
            f"{place}.{odd[0]} failed the check order: expected that the decoder calls each block "
            f"once, found {found[odd[0]]} calls{please}"
        )
    for number, call in enumerate(calls):
        if call.block != number:
            raise UnsupportedModelError(
                f"{place}.{call.block} failed the check order: expected to be called after the "
                f"block before it, found it called as number {number}{please}"
            )
        if number and not torch.equal(calls[number - 1].output, call.hidden):
            raise UnsupportedModelError(
                f"{place}.{number} failed the check order: expected to be called on the output of "
                f"the block before it, found something else{please}"
            )


def _copied(value: Any) -> Any:
    """Return arguments of a call with tensors and containers that nobody else writes to."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return value


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, tuple | list):
        value = next(item for item in value if isinstance(item, Tensor))
    assert isinstance(value, Tensor)
    return value


def _prove_unit(run: _Run, unit: FFNUnit) -> FFNUnit | Refusal:
    """Return the unit with its fusion settled, or which check it failed."""
    module = run.architecture.module_name(unit)
    call = run.calls[unit.block]
    if (error := _difference(run.output(unit.block), call.output)) > TOLERANCE:
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
            return candidate
        verdict = Refusal(module, reason)
    return verdict


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
    return [
        torch.randperm(unit.width, generator=generator)[: unit.width // 2].sort().values.tolist()
        for _ in range(unit.ffns)
    ]


def _masked_output(run: _Run, unit: FFNUnit, kept_EK: list[list[int]]) -> Tensor:
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
    _set_parameter(block, unit.down, nn.Parameter(masked, requires_grad=False))
    output = run.output(unit.block)
    _set_parameter(block, unit.down, down)
    return output


def _cut_fails(run: _Run, unit: FFNUnit, kept_EK: list[list[int]], masked: Tensor) -> str | None:
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
            return f"cut: expected the output with masked channels, found {_first_line(problem)}"
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
            _set_parameter(block, name, original)
