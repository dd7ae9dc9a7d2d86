"""The proof, by execution, that the units of a model are what discovery takes them for.

A small random model of the same class runs on a few tokens. One unit of every kind is proved:

    alone        none of its parameters is also used elsewhere
    order        the decoder calls each block once, in order, each on the output of the one before
    replay       a block that is called again as the decoder called it computes the same
    bites        with half of the channels masked, the block computes something else
    cut          with the same channels cut out, it computes what it computes with them masked, and
                 so with the other half
    neighbours   the blocks before and after compute what they did
    watched      its activations are seen while the block runs, and of which token each is
    whole        of attention: the whole decoder computes with the groups cut out what it computes
                 with them masked, so that no other block reads its keys and values

Masked is a channel whose columns of down are zero, which is the same as zeros at its input. The
channels of an attention are its KV groups.

Shapes: B windows, T tokens, D hidden, F channels, E experts, K kept channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.expert_proof import with_experts
from cfsp.architecture.ffns import is_bias_of
from cfsp.architecture.found import Architecture, Refusal, Unit
from cfsp.architecture.model_classes import empty_stock_model, identity_of
from cfsp.architecture.small_run import (
    FailedCheckError,
    SmallRun,
    check_bites,
    check_same,
    checking,
    replaced,
    run_small,
    set_parameter,
)
from cfsp.errors import UnknownModelError, UnsupportedModelError
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, Part, unit_parts


@torch.no_grad()
def prove(config: PreTrainedConfig, parts: tuple[Part, ...] = DEFAULT_PARTS) -> Architecture:
    """Return the blocks of a config's model and those of its units that can be cut.

    Units of `parts` must be there, FFNs in any case, which blocks are known by, and the blocks must
    run one by one: else it is an `UnsupportedModelError`.
    """
    proved = []
    for part in UNIT_PARTS:
        if part in (*unit_parts(parts), "ffn"):
            goes_whole = part == "kv" and "attention" in parts
            proved.append(_prove_part(config, "attention" if goes_whole else part))
    # Attention comes before the FFN, or beside it.
    units = [unit for found in reversed(proved) for unit in found.units]
    architecture = replace(
        proved[0],
        units=tuple(sorted(units, key=lambda unit: unit.block)),
        refused=tuple(refusal for found in proved for refusal in found.refused),
    )
    if "experts" not in parts:
        return architecture
    return with_experts(architecture, config, small_run_of(config))


def _prove_part(config: PreTrainedConfig, part: Part) -> Architecture:
    """Return the blocks and the units of one part that can be cut, or go (`attention`)."""
    architecture, shared = _guess(config, part)
    refused, run = list(architecture.refused), None
    verdicts: dict[object, Unit | FailedCheckError] = {}
    units: list[Unit] = []
    for number, unit in enumerate(architecture.units):
        names = [architecture.block_prefix(unit.block) + name for name in unit.axes]
        if elsewhere := next((name for name in names if name in shared), None):
            verdict: Unit | FailedCheckError = FailedCheckError(
                f"alone: expected weights that are used nowhere else, found that {elsewhere} is "
                f"{shared[elsewhere]} too"
            )
        else:
            run = run or run_small(config, architecture, part)
            small = run.architecture.units[number]
            kind = unit.kind, _conduct(run.blocks[unit.block], small)
            if kind not in verdicts:
                verdicts[kind] = _verdict(run, small, part)
            verdict = verdicts[kind]
        if isinstance(verdict, FailedCheckError):
            refused.append(Refusal(architecture.module_name(unit), str(verdict)))
        else:
            units.append(unit.as_proved(verdict))
    if not units:
        raise _unsupported(architecture, refused, part)
    return replace(architecture, units=tuple(units), refused=tuple(refused))


def _verdict(run: SmallRun, unit: Unit, part: Part) -> Unit | FailedCheckError:
    failure = FailedCheckError()
    for tried in (unit, unit.whole()) if part == "attention" else (unit,):
        try:
            return _prove_unit(run, tried, part)
        except FailedCheckError as error:
            failure = error
    return failure


# Of one command, which asks about one set of blocks or experts after the other.
_small_runs: dict[Any, SmallRun] = {}


def small_run_of(stock: PreTrainedConfig) -> SmallRun:
    """Return a small model of a stock config that ran once; the last one is kept."""
    key = identity_of(stock)
    if key not in _small_runs:
        _small_runs.clear()
        architecture, _ = _guess(stock, "ffn")
        _small_runs[key] = run_small(stock, architecture)
    return _small_runs[key]


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
    name = architecture.class_name
    # One that ran tells more than one whose weights were found to have another form.
    nearest = next(iter(refused[len(architecture.refused) :] or refused), None)
    first = f"{nearest.module} failed the check {nearest.reason}" if nearest else ""
    if part != "ffn":
        return UnsupportedModelError(
            f"no attention of {name} can {'lose KV groups' if part == 'kv' else 'go'}: "
            f"{first or 'none'}; prune it without the part {part}"
        )
    if refused:
        return UnknownModelError(f"no FFN of {name} can be cut: {first}")
    return UnsupportedModelError(
        f"{name} has no FFN in its {architecture.block_count} blocks {architecture.blocks} that "
        "cfsp could find; expected modules whose matrices lead from the hidden size to channels "
        "and back; if it has some, please report the model type"
    )


def _guess(config: PreTrainedConfig, part: Part) -> tuple[Architecture, dict[str, str]]:
    """Return what discovery finds, and for every shared parameter another name of it."""
    model = empty_stock_model(config)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: group[1] if name == group[0] else group[0]
        for group in names.values()
        if len(group) > 1
        for name in group
    }
    return find_architecture(model, part), shared


def _prove_unit(run: SmallRun, unit: Unit, part: Part) -> Unit:
    """Return the unit as it can be cut, or raise FailedCheckError."""
    if unit.part == "kv" and unit.width == 1 and part == "kv":
        raise FailedCheckError("heads: expected two KV groups or more, found one")
    dense = run.calls[unit.block].output
    check_same("replay", "the same output again", partial(run.output, unit.block), dense)
    if unit.part == "kv" and unit.width == 1:
        # Nothing of it can go but all, which `cfsp.streaming.block_proof` proves.
        _check_is_watched(run, unit)
        return _as_entered(run, unit.whole())
    # Each half of the channels in its turn: one channel may act on all others, as the largest does
    # where activations are quantised.
    halves: list[tuple[list[list[int]], Tensor]] = []
    for kept_EK in _random_halves(unit):
        with _masked(run, unit, kept_EK):
            halves.append((kept_EK, run.output(unit.block)))
    check_bites("with half of the channels masked", halves[0][1], dense)
    unit = _first_that_can_be_cut(run, unit, halves)
    _check_is_watched(run, unit)
    if unit.part == "ffn":
        return unit
    # No other block may depend on its keys and values.
    kept_EK = halves[0][0]
    with _masked(run, unit, kept_EK):
        masked = run.decoder_output()
    with _cut(run.blocks[unit.block], unit, kept_EK):
        check_same("whole", "the decoder's output with masked groups", run.decoder_output, masked)
    return _as_entered(run, unit)


def _first_that_can_be_cut(
    run: SmallRun, unit: Unit, halves: list[tuple[list[list[int]], Tensor]]
) -> Unit:
    failure = FailedCheckError()
    for reading in unit.readings():
        try:
            _check_cut(run, reading, halves)
            return reading
        except FailedCheckError as error:
            failure = error
    raise failure


def _check_is_watched(run: SmallRun, unit: Unit) -> None:
    observed = observed_activations(run.blocks[unit.block], [unit], lambda *rows: None)
    with checking("watched", "to see its activations"), observed:
        run.output(unit.block)


def _as_entered(run: SmallRun, unit: Unit) -> Unit:
    """Return an attention with what it returns, and the module that is entered after it."""
    # With an output matrix of zeros nothing is added to the hidden state, so that it enters that
    # module as it entered the block. It always does where an FFN is beside the attention.
    block = run.blocks[unit.block]
    zeros = {
        name: torch.zeros_like(each)
        for name, each in block.named_parameters()
        if name == unit.down or is_bias_of(name, unit.down)
    }
    with checking("entered", "that it runs once in a block, with nothing in its place too"):
        with replaced(block, zeros):
            found, output = _entered_as_the_block(run, unit)
        always, _ = _entered_as_the_block(run, unit)
    after = next((path for path in found if path not in always), None)
    extras = len(output) - 1 if isinstance(output, tuple | list) else None
    return replace(unit, after=after, extras=extras)


def _entered_as_the_block(run: SmallRun, unit: Unit) -> tuple[list[str], Any]:
    """Return which modules the block's input enters after an attention, and what that gives."""
    block, hidden = run.blocks[unit.block], run.calls[unit.block].hidden
    found: list[str] = []
    ran: list[Any] = []

    def before(path: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if ran and inputs and inputs[0].shape == hidden.shape and torch.equal(inputs[0], hidden):
            found.append(path)

    with ExitStack() as stack:
        attention = block.get_submodule(unit.path)
        ends = attention.register_forward_hook(lambda _m, _a, output: ran.append(output))
        stack.enter_context(ends)
        for path, module in block.named_modules():
            if path and not f"{path}.".startswith(f"{unit.path}."):
                entered = partial(before, path)
                stack.enter_context(module.register_forward_pre_hook(entered, with_kwargs=True))
        run.output(unit.block)
    return found, ran[0]


def _random_halves(unit: Unit) -> list[list[list[int]]]:
    """Return channels to keep of each FFN and all others, in ascending order (2 x E lists of K)."""
    generator = torch.Generator().manual_seed(unit.width)
    half = max(1, unit.width // 2)
    order_EF = [torch.randperm(unit.width, generator=generator).tolist() for _ in range(unit.ffns)]
    parts = slice(half), slice(half, None)
    return [[sorted(order_F[part]) for order_F in order_EF] for part in parts]


@contextmanager
def _masked(run: SmallRun, unit: Unit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Let the columns of down that are not kept be zeros for a while."""
    block, axis = run.blocks[unit.block], unit.axes[unit.down].axis
    down = block.get_parameter(unit.down)
    masked = torch.zeros_like(down)
    # A single matrix has no axis of experts.
    lead = down.ndim - 2
    for ffn, kept in enumerate(kept_EK):
        new, old = (masked[ffn], down[ffn]) if lead else (masked, down)
        index = torch.tensor(unit.columns_of(kept), dtype=torch.long)
        new.index_copy_(axis - lead, index, old.index_select(axis - lead, index))
    with replaced(block, {unit.down: masked}):
        yield


def _check_cut(run: SmallRun, unit: Unit, halves: list[tuple[list[list[int]], Tensor]]) -> None:
    """Check that a unit can be cut: to each half of its channels, with the output of the masked."""
    for kept_EK, masked in halves:
        with _cut(run.blocks[unit.block], unit, kept_EK):
            output = partial(run.output, unit.block)
            check_same("cut", "the output with masked channels", output, masked)
            for other in {unit.block - 1, unit.block + 1} & {*range(len(run.blocks))}:
                output, same = partial(run.output, other), run.calls[other].output
                check_same("neighbours", f"the same output of block {other}", output, same)


@contextmanager
def _cut(block: nn.Module, unit: Unit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Cut all but the kept channels of a unit out of its block; put them back afterwards."""
    originals = {name: block.get_parameter(name) for name in unit.axes}
    module: Any = block.get_submodule(unit.path)
    config = getattr(module, "config", None)
    unit.resize(block, len(kept_EK[0]))
    try:
        for name, original in originals.items():
            block.get_parameter(name).copy_(unit.select(name, original, kept_EK))
        yield
    finally:
        unit.resize(block, unit.width)
        if unit.config_numbers:
            module.config = config
        for name, original in originals.items():
            set_parameter(block, name, original)
