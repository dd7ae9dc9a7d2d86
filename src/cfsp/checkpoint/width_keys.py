"""By which keys of a config its stock class gets its widths, found by trying, and with what values.

What is tried are models without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import empty_stock_model, with_values
from cfsp.architecture.proof import small_run_of
from cfsp.architecture.small_run import (
    TOLERANCE,
    difference,
    run_decoder,
    small_skeleton,
    small_tokens,
)
from cfsp.checkpoint.config_blocks import facts_of
from cfsp.checkpoint.reading import channel_parameters
from cfsp.checkpoint.text_config import text_config_of
from cfsp.settings import Part

# Names of keys that may give a width although their value is none, or a part of one.
_LIKE_A_WIDTH = ("intermediate", "ffn", "inner", "mlp", "expan", "ff_dim", "dim_ff")


class WidthSearch:
    """The keys of a stock config that give the FFNs of an architecture's units their width.

    A key counts if the model that is built with another value of it has other widths, in
    proportion, and is the same in all else: a class may also scale an output by the number.
    """

    def __init__(self, stock: PreTrainedConfig, architecture: Architecture) -> None:
        self.stock = stock
        self._architecture = architecture
        self._model = empty_stock_model(stock)
        self._widths = _widths_by_path(self._model, {unit.path for unit in architecture.units})
        names = sorted(self._widths)
        asked = f"{type(stock).__name__} {names} {stock.to_json_string(use_diff=False)}"
        if asked not in _found:
            _found[asked] = {
                key: times
                for key, times in _keys_by_trying(stock, self._widths)
                if _says_widths_only(stock, key, times)
            }
        # By their names: path -> the width of the FFNs there, as a multiple of the value.
        self.keys: Mapping[str, dict[str, int]] = _found[asked]

    def stock_values(self, widths: Sequence[int]) -> dict[str, int] | None:
        """Return the values of keys by which the stock class builds widths; None if it can't."""
        wanted: dict[str, set[int]] = {}
        for unit, width in zip(self._architecture.units, widths, strict=True):
            wanted.setdefault(unit.path, set()).add(width)
        values: dict[str, int] = {}
        for key, times in self.keys.items():
            if any(wanted[path] != self._widths[path] for path in times):
                # A key that changes must suit every path that it is for.
                found = {divmod(width, n) for path, n in times.items() for width in wanted[path]}
                value, rest = found.pop()
                if found or rest:
                    return None
                values[key] = value
        # Whether they are all that it takes shows what is built.
        return values if self.finds_units(values, widths) else None

    def wrong_value(self, widths: Sequence[int]) -> dict[str, int]:
        """Return a key with a value by which the stock class builds none of the widths, if any."""
        for key, times in self.keys.items():
            value = 2 * max(widths) // min(times.values())
            if self.finds_units({key: value}):
                return {key: value}
        return {}

    def finds_units(self, values: Mapping[str, int], widths: Sequence[int] | None = None) -> bool:
        """Return whether the stock config with other values has the units, of any widths given."""
        # An FFN much narrower than the hidden size may not be recognised any more, and a key
        # may say the width of something else too, such as FFNs that the proof refused.
        model = empty_stock_model(with_values(self.stock, values))
        if self._other_shapes(model) != self._other_shapes(self._model):
            return False
        places = [(unit.block, unit.path) for unit in self._architecture.units]
        # Those that the proof refused are found as well.
        width_of = _widths_by_place(model)
        if widths is None:
            return all(place in width_of for place in places)
        return all(width_of.get(at) == width for at, width in zip(places, widths, strict=True))

    def _other_shapes(self, model: PreTrainedModel) -> dict[str, torch.Size]:
        """Return the shapes of all tensors of a model that have no channels of its FFN units."""
        channels = channel_parameters(self._architecture)
        state = model.state_dict()
        return {name: tensor.shape for name, tensor in state.items() if name not in channels}


# One command asks several times.
_found: dict[str, dict[str, dict[str, int]]] = {}


def _keys_by_trying(
    config: PreTrainedConfig, widths: Mapping[str, set[int]]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the keys that give FFNs their width, whatever else they may say."""
    known = set().union(*widths.values())
    for name, old in text_config_of(config).to_dict().items():
        like = any(word in name for word in _LIKE_A_WIDTH)
        if old is None and like:
            value = min(known) // 2
        elif type(old) is int and old > 1 and (old in known or like):
            value = old // 2
        else:
            continue
        try:
            model = empty_stock_model(with_values(config, {name: value}))
            after = _widths_by_path(model, set(widths))
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
            yield name, times


@torch.no_grad()
def _says_widths_only(config: PreTrainedConfig, key: str, times: Mapping[str, int]) -> bool:
    """Return whether a small model, built with twice the value and cut back, computes the same."""
    run = small_run_of(config)
    architecture, model = run.architecture, run.model
    units = [unit for unit in architecture.units if unit.path in times]
    value = 2 * units[0].width // times[units[0].path]
    try:
        built = small_skeleton(with_values(model.config, {key: value}), type(model))
        for unit in units:
            unit.resize(built.get_submodule(architecture.blocks)[unit.block], unit.width)
        decoder, same = (each.get_submodule(architecture.decoder) for each in (built, model))
        decoder.load_state_dict(same.state_dict(), assign=True)
        found = run_decoder(decoder, small_tokens(built))
    except Exception:  # whatever a class does with a number that it does not expect
        return False
    return difference(found, run.decoder_output()) <= TOLERANCE


def _widths_by_path(model: PreTrainedModel, paths: set[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for (_, path), width in _widths_by_place(model).items():
        if path in paths:
            found.setdefault(path, set()).add(width)
    return found


def _widths_by_place(model: PreTrainedModel, part: Part = "ffn") -> dict[tuple[int, str], int]:
    """Return the widths of the units that a model seems to have, by their block and path in it."""
    units = find_architecture(model, part).units
    return {(unit.block, unit.path): unit.width for unit in units}


def stock_heads(
    stock: PreTrainedConfig, architecture: Architecture, widths: Sequence[int]
) -> dict[str, int] | None:
    """Return the numbers of heads by which the stock class builds such groups; None if it can't."""
    units, resized = architecture.units, empty_stock_model(stock)
    width_of = _widths_by_place(resized, "kv")
    # What can only go whole has no groups that are found.
    stock_widths = [width_of.get((unit.block, unit.path), unit.width) for unit in units]
    if stock_widths == list(widths):
        return {}
    text_config = text_config_of(stock)
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
    try:
        built = empty_stock_model(with_values(stock, values))
    except Exception:  # whatever a config or class does with numbers that it does not expect
        return None
    blocks: Any = resized.get_submodule(architecture.blocks)
    for unit, width in zip(units, widths, strict=True):
        unit.resize(blocks[unit.block], width)
    if facts_of(built) != facts_of(resized):
        return None
    return {text_config.attribute_map.get(name, name): value for name, value in values.items()}
