"""A small random model of a class that ran once, with how its decoder called each block.

What it computes is what all proofs compare; a check that fails raises `FailedCheckError`.

It computes in float64, also what a class asks to be computed in float32, as routers and norms are.
Else the order in which a kernel adds, which depends on the processor, would decide near ties:
whether a block of random weights takes one expert or another.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.smaller_config import smaller_configs
from cfsp.errors import UnknownModelError, UnsupportedModelError, first_line
from cfsp.settings import Part

WINDOWS, TOKENS = 2, 12
LEAST_CHANNELS = 8
MOST_BYTES = 4_000_000_000

TOLERANCE = 1e-5
# A mask that changes less than this proves nothing: cut and masked would agree by chance.
LEAST_EFFECT = 1e-3


class FailedCheckError(Exception):
    """Says which check failed, what was expected and what was found."""


@dataclass(frozen=True)
class Call:
    """How the decoder called a block, and what came out."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor  # the hidden state that went in
    output: Tensor


class _Doubles(TorchFunctionMode):
    """Makes float64 of every float32 that is asked for, and of what is made in the default."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _double(value) for name, value in (kwargs or {}).items()}
        # The least number of float64 is no number of the default.
        if func in (torch.tensor, torch.full) and isinstance(args[-1], float):
            named.setdefault("dtype", torch.float64)
        result = func(*map(_double, args), **named)
        # As `torch.ones(2, 2)` is, by which no float64 can be multiplied.
        in_default = isinstance(result, Tensor) and result.dtype is torch.float32
        return result.double() if in_default else result


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _in_doubles() -> Iterator[None]:
    """Compute in float64 and in one thread.

    Several wait for each other: beside another program proofs took ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class SmallRun:
    """A small model that ran once, with weights in its text decoder only."""

    architecture: Architecture
    model: nn.Module
    blocks: nn.ModuleList
    calls: tuple[Call, ...]

    def output(self, block: int) -> Tensor:
        """Return what a block computes when it is called as in the run."""
        call = self.calls[block]
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (call.args, call.kwargs))
        with _in_doubles():
            return first_tensor(self.blocks[block](*args, **kwargs))

    def decoder_output(self) -> Tensor:
        """Return what the decoder computes from the tokens of the run."""
        decoder = self.model.get_submodule(self.architecture.decoder)
        return run_decoder(decoder, small_tokens(self.model))


def run_small(config: PreTrainedConfig, architecture: Architecture, part: Part = "ffn") -> SmallRun:
    """Run the smallest model that has the units of the large one, which are of one part."""
    reason = "none has the same FFNs at the same places"
    for smaller in smaller_configs(config):
        try:
            model = small_skeleton(smaller)
            found = find_architecture(model, part)
            if not _has_units_of(found, architecture):
                continue
            blocks: Any = model.get_submodule(found.blocks)
            if _fill(model.get_submodule(found.decoder), blocks):
                return SmallRun(found, model, blocks, _record(model, found))
            reason = f"it takes more than {MOST_BYTES / 1e9:.0f} GB"
        except UnsupportedModelError:
            raise
        except Exception as error:  # a size that does not fit the others: the next one may
            if "can't allocate memory" not in str(error):  # or is too much for this machine
                reason = first_line(error)
    raise UnknownModelError(
        f"the decoder of {architecture.class_name} could not be tried on random weights ({reason})"
    )


def small_skeleton(config: PreTrainedConfig) -> Any:
    """Return a small model with parameters on the meta device and real buffers."""
    # The plain loop over experts takes any width; faster ones want rows of whole 16 bytes.
    config._experts_implementation = "eager"
    with _in_doubles(), init_empty_weights(include_buffers=False):
        model = model_class_of(config)._from_config(config, dtype=torch.float64)
    return model.eval().requires_grad_(False)


def _has_units_of(small: Architecture, large: Architecture) -> bool:
    """Return whether a small model has units of the same form at the same places."""
    return (
        (small.blocks, small.block_count) == (large.blocks, large.block_count)
        and len(small.units) == len(large.units)
        and all(
            (mine.block, mine.form, mine.ffns) == (other.block, other.form, other.ffns)
            and mine.width >= min(other.width, LEAST_CHANNELS)
            for mine, other in zip(small.units, large.units, strict=True)
        )
    )


def _fill(decoder: nn.Module, blocks: nn.ModuleList) -> bool:
    """Give the text decoder random weights, unless they are too many: then return False."""
    # Blocks that are built alike have the same weights.
    examples: dict[object, nn.Module] = {}
    example_of = [examples.setdefault(_build(block), block) for block in blocks]
    in_blocks = {id(parameter) for parameter in blocks.parameters()}
    chosen = {id(parameter) for block in examples.values() for parameter in block.parameters()}
    parameters = {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if id(parameter) in chosen or id(parameter) not in in_blocks
    }
    if 8 * sum(parameter.numel() for parameter in parameters.values()) > MOST_BYTES:
        return False
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        set_parameter(decoder, name, _random(name, parameter, generator))
    for block, example in zip(blocks, example_of, strict=True):
        for name, parameter in example.named_parameters():
            set_parameter(block, name, parameter)
    return True


def _build(block: nn.Module) -> tuple[object, ...]:
    types = [(name, type(module)) for name, module in block.named_modules()]
    shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
    return (*types, *shapes)


def set_parameter(module: nn.Module, path: str, parameter: Tensor) -> None:
    """Make a tensor the parameter at a dotted path from a module."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, parameter)


def rebuilt(
    run: SmallRun,
    config: PreTrainedConfig,
    place_of: Callable[[str, Tensor], tuple[str, Tensor] | None],
) -> SmallRun:
    """Return a small model of another config, with the tensors of one that ran.

    `place_of` gives the new name and values of each by its name; None where it goes.
    """
    model, whole = small_skeleton(config), run.model
    for named in (whole.named_parameters, whole.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not tensor.is_meta and (placed := place_of(name, tensor)) is not None:
                set_parameter(model, *placed)
    return replace(run, model=model, blocks=model.get_submodule(run.architecture.blocks))


@contextmanager
def replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module have other parameters for a while, by their dotted paths."""
    originals = {name: module.get_parameter(name) for name in tensors}
    try:
        for name, tensor in tensors.items():
            set_parameter(module, name, nn.Parameter(tensor, False))
        yield
    finally:
        for name, original in originals.items():
            set_parameter(module, name, original)


def _random(name: str, parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Return weights as a trained model might have them: sums stay small, norms are about 1."""
    values = torch.randn(parameter.shape, generator=generator).double()
    if parameter.ndim > 1:
        values *= parameter.shape[-1] ** -0.5
    else:
        values *= 0.1
        if name.endswith("weight") and re.search(r"norm|ln_|ln\d", name):
            values += 1
    return nn.Parameter(values, requires_grad=False)


def _record(model: Any, architecture: Architecture) -> tuple[Call, ...]:
    """Run the decoder on a few tokens; return how it called each block, one after the other."""
    calls: list[Call] = []
    begun: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copied, because a block may write to what it is given.
        begun.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs)))

    def after(index: int, _block: nn.Module, _args: Any, output: Any) -> None:
        args, kwargs = begun.pop()
        hidden = first_tensor(kwargs.get("hidden_states", args or tuple(kwargs.values())))
        calls.append(Call(index, args, kwargs, hidden, first_tensor(output).clone()))

    with ExitStack() as stack:
        for index, block in enumerate(model.get_submodule(architecture.blocks)):
            stack.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(partial(after, index)))
        run_decoder(model.get_submodule(architecture.decoder), small_tokens(model))
    _check_order(architecture, calls)
    return tuple(calls)


def small_tokens(model: Any) -> Tensor:
    """Return the few token ids that a small model runs on (B x T), the same ones every time."""
    # The first ids are often special ones.
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, min(vocabulary, 200), (WINDOWS, TOKENS), generator=generator)


def _check_order(architecture: Architecture, calls: list[Call]) -> None:
    """Check that the decoder calls each block once, on the output of the one before it."""

    def error(block: int, expected: str, found: str) -> UnsupportedModelError:
        return UnknownModelError(
            f"the blocks of {architecture.class_name} cannot be run one by one: "
            f"{architecture.blocks}.{block} failed the check order: expected {expected}, found "
            f"{found}"
        )

    times = Counter(call.block for call in calls)
    for block in range(architecture.block_count):
        if times[block] != 1:
            raise error(block, "one call of each block", f"{times[block]} of this one")
    for number, call in enumerate(calls):
        if call.block != number:
            raise error(call.block, "blocks in their order", f"it called as number {number}")
        if number and not torch.equal(calls[number - 1].output, call.hidden):
            raise error(number, "the output of the block before as input", "something else")
    shape = tuple(calls[0].hidden.shape)
    if (WINDOWS, TOKENS) not in pairwise(shape):
        expected = (
            f"hidden states with an axis of windows ({WINDOWS}) before one of tokens ({TOKENS})"
        )
        raise error(0, expected, f"some of shape {list(shape)}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def checking(check: str, expected: str) -> Iterator[None]:
    """Let a check fail by whatever goes wrong, whatever a class does with what was cut away."""
    try:
        yield
    except FailedCheckError:
        raise
    except Exception as problem:
        # Without the call to report the model, which comes once, at the end.
        refused = isinstance(problem, UnsupportedModelError)
        found = f"that {problem.args[0]}" if refused else first_line(problem)
        raise FailedCheckError(f"{check}: expected {expected}, found {found}") from problem


def check_same(check: str, expected: str, compute: Callable[[], Tensor], wanted: Tensor) -> None:
    """Check that a computation gives what it must."""
    with checking(check, expected):
        error = difference(compute(), wanted)
    if not error <= TOLERANCE:
        raise FailedCheckError(
            f"{check}: expected {expected}, found a relative difference of {error:.1e}"
        )


def check_bites(condition: str, with_it: Tensor, without: Tensor) -> None:
    """Check that the output is another on a condition: else comparing it proves nothing."""
    if not (effect := difference(with_it, without)) > LEAST_EFFECT:
        raise FailedCheckError(
            f"bites: expected another output {condition}, found a difference of {effect:.1e}"
        )


def run_decoder(decoder: Any, tokens_BT: Tensor) -> Tensor:
    """Return the hidden state that a decoder computes, without a cache."""
    return first_tensor(call_decoder(decoder, tokens_BT, use_cache=False))


def call_decoder(decoder: Any, tokens_BT: Tensor, **more: Any) -> Any:
    """Return what a decoder of a small model gives."""
    with _in_doubles():
        return decoder(input_ids=tokens_BT, **more)


def first_tensor(value: Any) -> Tensor:
    """Return the hidden state of what a block or a decoder returns."""
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, tuple | list):
        value = next(item for item in value if isinstance(item, Tensor))
    assert isinstance(value, Tensor)
    return value
