"""By which keys of a config its stock class gets its widths, found by trying, and with what values.

What is tried are models without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.proof import small_run_of
from cfsp.architecture.resizing import resize_ffn
from cfsp.architecture.small_run import (
    TOLERANCE,
    difference,
    run_decoder,
    small_skeleton,
    small_tokens,
)
from cfsp.checkpoint.modeling_code import resized_attention
from cfsp.settings import Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture, Unit

# Names of keys that may give a width although their value is none, or a part of one.
_LIKE_A_WIDTH = ("intermediate", "ffn", "inner", "mlp", "expan", "ff_dim", "dim_ff")


@dataclass(frozen=True)
class WidthKey:
    """A key of a config that gives FFNs their width.

    Attributes:
        name: of the key, in the text config.
        times: the width of the FFNs of every path that it is for, as a multiple of its value.
    """

    name: str
    times: dict[str, int]


@dataclass(frozen=True)
class WidthSearch:
    """The keys of a stock config that give FFNs their width.

    Attributes:
        stock: the config.
        widths: of its FFNs, by path.
        keys: what was found.
    """

    stock: PreTrainedConfig
    widths: Mapping[str, set[int]]
    keys: Sequence[WidthKey]

    @staticmethod
    def of(stock: PreTrainedConfig, units: Sequence[Unit]) -> WidthSearch:
        """Search for the keys of the FFNs at the paths of some units."""
        widths = _widths_by_path(stock, {unit.path for unit in units})
        return WidthSearch(stock, widths, width_keys(stock, widths))

    def stock_values(
        self, architecture: Architecture, widths: Sequence[int]
    ) -> dict[str, int] | None:
        """Return the values of keys by which the stock class builds widths; None if it can't."""
        wanted: dict[str, set[int]] = {}
        for unit, width in zip(architecture.units, widths, strict=True):
            wanted.setdefault(unit.path, set()).add(width)
        values: dict[str, int] = {}
        for path, width_of_path in wanted.items():
            if width_of_path == self.widths[path]:
                continue
            own = [key for key in self.keys if path in key.times]
            if len(width_of_path) != 1 or len(own) != 1:
                return None
            (width,), (key,) = width_of_path, own
            value, rest = divmod(width, key.times[path])
            if rest or values.setdefault(key.name, value) != value:
                return None
        # A key that changes must suit every path that it is for.
        for key in self.keys:
            if key.name in values:
                for path, times in key.times.items():
                    if wanted.get(path) != {values[key.name] * times}:
                        return None
        if not units_are_found(self.stock, values, architecture, widths):
            return None
        return values

    def wrong_value(self, architecture: Architecture, widths: Sequence[int]) -> dict[str, int]:
        """Return a key with a value by which the stock class builds none of the widths.

        Twice the widest: whatever must divide a width divides it. Nothing if there is no such key.
        """
        for key in self.keys:
            value = 2 * max(widths) // min(key.times.values())
            if units_are_found(self.stock, {key.name: value}, architecture):
                return {key.name: value}
        return {}


def width_keys(config: PreTrainedConfig, widths: Mapping[str, set[int]]) -> list[WidthKey]:
    """Return the keys of a config that give FFNs their width, found by trying.

    A key counts if the model that is built with another value of it has other widths, in the same
    proportion to the value, and is the same model in all else: a class may also scale an output by
    the number.

    Args:
        config: of the stock model.
        widths: those of its FFNs, by path.
    """
    asked = f"{type(config).__name__} {sorted(widths)} {config.to_json_string(use_diff=False)}"
    if asked not in _found:
        _found[asked] = [
            key for key in _keys_by_trying(config, widths) if _says_widths_only(config, key)
        ]
    return _found[asked]


# One command asks several times.
_found: dict[str, list[WidthKey]] = {}


def _keys_by_trying(config: PreTrainedConfig, widths: Mapping[str, set[int]]) -> Iterator[WidthKey]:
    """Yield the keys that give FFNs their width, whatever else they may say."""
    for name, value in _candidates(config, set().union(*widths.values())):
        changed = copy.deepcopy(config)
        try:
            setattr(changed.get_text_config(decoder=True), name, value)
            after = _widths_by_path(changed, set(widths))
        except Exception:  # whatever a config or class does with a number that it does not expect
            continue
        affected = [path for path in widths if after.get(path) != widths[path]]
        times = {
            path: width // value
            for path in affected
            for width in after.get(path, ())
            if len(after[path]) == 1 and width % value == 0
        }
        if affected and len(times) == len(affected):
            yield WidthKey(name, times)


@torch.no_grad()
def _says_widths_only(config: PreTrainedConfig, key: WidthKey) -> bool:
    """Return whether a small model, built with twice the value and cut back, computes the same."""
    run = small_run_of(config)
    architecture = run.architecture
    units = [unit for unit in architecture.units if unit.path in key.times]
    changed: Any = copy.deepcopy(run.model.config)
    value = 2 * units[0].width // key.times[units[0].path]
    setattr(changed.get_text_config(decoder=True), key.name, value)
    try:
        built = small_skeleton(changed, type(run.model))
        for unit in units:
            block = built.get_submodule(architecture.blocks)[unit.block]
            resize_ffn(block, unit.width, unit.plain_axes, unit.plain_attributes)
        decoder, same = (model.get_submodule(architecture.decoder) for model in (built, run.model))
        decoder.load_state_dict(same.state_dict(), assign=True)
        found = run_decoder(decoder, small_tokens(built))
    except Exception:  # whatever a class does with a number that it does not expect
        return False
    return difference(found, run.decoder_output()) <= TOLERANCE


def _candidates(config: PreTrainedConfig, widths: set[int]) -> Iterator[tuple[str, int]]:
    """Yield keys of the text config that may give a width, with another value to try."""
    text_config = config.get_text_config(decoder=True)
    for name, value in text_config.to_dict().items():
        like = any(word in name for word in _LIKE_A_WIDTH)
        if value is None and like:
            yield name, min(widths) // 2
        elif type(value) is int and value > 1 and (value in widths or like):
            yield name, value // 2


def _widths_by_path(config: PreTrainedConfig, paths: set[str]) -> dict[str, set[int]]:
    """Return the widths of the FFNs that the stock class builds, by their path in a block."""
    found: dict[str, set[int]] = {}
    for (_, path), width in widths_by_place(empty_stock_model(config)).items():
        if path in paths:
            found.setdefault(path, set()).add(width)
    return found


def widths_by_place(model: PreTrainedModel, part: Part = "ffn") -> dict[tuple[int, str], int]:
    """Return the widths of the units that a model seems to have, by their block and path in it."""
    units = find_architecture(model, part).units
    return {(unit.block, unit.path): unit.width for unit in units}


def empty_stock_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that the stock class builds, on the meta device."""
    with torch.device("meta"):
        return model_class_of(config)._from_config(config)


def units_are_found(
    stock: PreTrainedConfig,
    values: Mapping[str, int],
    architecture: Architecture,
    widths: Sequence[int] | None = None,
) -> bool:
    """Return whether a stock config with other values has the units, of these widths if given.

    An FFN that is much narrower than the hidden size may not be recognised as one any more, and a
    key may say the width of something else too, such as FFNs that the proof refused.
    """
    changed = copy.deepcopy(stock)
    for name, value in values.items():
        setattr(changed.get_text_config(decoder=True), name, value)
    model = empty_stock_model(changed)
    if _other_shapes(model, architecture) != _other_shapes(empty_stock_model(stock), architecture):
        return False
    places = [(unit.block, unit.path) for unit in architecture.units]
    # Those that the proof refused are found as well.
    width_of = widths_by_place(model)
    if widths is None:
        return all(place in width_of for place in places)
    return all(width_of.get(at) == width for at, width in zip(places, widths, strict=True))


def _other_shapes(model: PreTrainedModel, architecture: Architecture) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of a model that have no channels of its FFN units."""
    channels = {
        architecture.block_prefix(unit.block) + name
        for unit in architecture.units
        for name in unit.axes
    }
    return {
        name: tensor.shape for name, tensor in model.state_dict().items() if name not in channels
    }


def stock_heads(
    stock: PreTrainedConfig, architecture: Architecture, widths: Sequence[int]
) -> dict[str, int] | None:
    """Return the numbers of heads by which the stock class builds attentions with so many groups.

    None if it cannot: the model that is built with these numbers must be the one that is resized,
    in every shape and every number that a module keeps.

    Args:
        stock: the config.
        architecture: with the attentions.
        widths: KV groups of each.
    """
    units, resized = architecture.units, empty_stock_model(stock)
    width_of = widths_by_place(resized, "kv")
    # What can only go whole has no groups that are found.
    stock_widths = [width_of.get((unit.block, unit.path), unit.width) for unit in units]
    if stock_widths == list(widths):
        return {}
    text_config: Any = stock.get_text_config(decoder=True)
    heads = getattr(text_config, "num_attention_heads", None)
    groups = getattr(text_config, "num_key_value_heads", None) or heads
    if len(set(widths)) != 1 or type(heads) is not int or type(groups) is not int:
        return None
    if heads % groups or set(stock_widths) != {groups}:
        return None
    size = units[0].axes[units[0].down].entries * groups // heads
    values = {"num_attention_heads": heads // groups * widths[0], "head_dim": size}
    if getattr(text_config, "num_key_value_heads", None) is not None:
        values["num_key_value_heads"] = widths[0]
    changed = copy.deepcopy(stock)
    try:
        for name, value in values.items():
            setattr(changed.get_text_config(decoder=True), name, value)
        built = empty_stock_model(changed)
    except Exception:  # whatever a config or class does with numbers that it does not expect
        return None
    blocks: Any = resized.get_submodule(architecture.blocks)
    for unit, width in zip(units, widths, strict=True):
        resized_attention(blocks[unit.block], unit, width)
    if _numbers_of(built, architecture) != _numbers_of(resized, architecture):
        return None
    return {text_config.attribute_map.get(name, name): value for name, value in values.items()}


def _numbers_of(model: PreTrainedModel, architecture: Architecture) -> dict[str, object]:
    """Return the shapes of a model's tensors and the numbers that its modules keep."""
    found: dict[str, object] = {}
    for named in (model.named_parameters, model.named_buffers):
        found |= {name: tuple(tensor.shape) for name, tensor in named()}
    for path, module in model.get_submodule(architecture.decoder).named_modules():
        for name, value in vars(module).items():
            if type(value) in (int, float):
                found[f"{path} {name}"] = value
    return found
