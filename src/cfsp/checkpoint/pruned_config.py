"""The config of a pruned model, as config.json and in memory: what is left, with its widths.

Widths that the stock class can build are said by its own keys. Where each block has one FFN, others
go to `per_layer_config`, the schema that transformers reads from 5.15 on; else to `ffn_widths`, by
block and path. KV groups that differ go to `kv_groups`; the stock numbers of heads are then those
of the unpruned model. All three need the modelling file.

What needs it must not load without it. The stock class fails where FFNs or attention layers have
other shapes than it builds, but would give an attention layer that is gone random weights. Where
nothing else differs, the stock key says another width than the FFNs have.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from cfsp.architecture.found import Architecture, Unit
from cfsp.architecture.model_classes import PRUNED, model_class_of, with_values
from cfsp.checkpoint.config_file import config_of, read_plain_fields
from cfsp.checkpoint.modeling_code import FFN_WIDTHS, KV_GROUPS, PER_LAYER_CONFIG, ModelingFile
from cfsp.checkpoint.own_files import CONFIG_FILE, MODELING_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import PRUNED_KEY, stock_config
from cfsp.checkpoint.stock_keys import WidthSearch, stock_heads, stock_without_blocks
from cfsp.checkpoint.text_config import text_config_of, text_path
from cfsp.errors import UnsupportedModelError
from cfsp.settings import Part


@dataclass(frozen=True)
class ConfigChanges:
    """What keys of a config become; None where they must not be there."""

    text: dict[str, Any]  # of the text config, which may be the config itself
    whole: dict[str, Any]
    file: ModelingFile | None = None  # that the config needs

    def applied_to(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config of the pruned model, of the class that the source's config has."""
        changed, whole = with_values(stock_config(config), self.text), dict(self.whole)
        per_layer = whole.pop(PER_LAYER_CONFIG, None)
        for key, value in whole.items():
            if value is not None:
                setattr(changed, key, value)
            elif hasattr(changed, key):
                delattr(changed, key)
        if per_layer is not None:  # last of all: it makes a config for every block out of the whole
            changed.per_layer_config = per_layer
        return changed

    def write(self, source: Checkpoint, target: Path) -> None:
        """Write config.json and the modelling file that it needs, if any."""
        fields = read_plain_fields(source.directory)
        text_fields, config = fields, source.config
        for name in text_path(source.config):
            config = getattr(config, name)
            if name not in text_fields:  # it stands at the top, or under an older name
                text_fields[name] = json.loads(config.to_json_string(use_diff=False))
            text_fields = text_fields[name]
        # What a class calls a key now may stand there under an older name, and both under one.
        before = text_config_of(source.config)
        names = before.attribute_map
        for key, value in self.text.items():
            every = {key, *(old for old, new in names.items() if new == key)}
            old = vars(before).get(key)  # transformers refuses to give what blocks have apart
            for name in sorted(every & text_fields.keys()) or [key]:
                text_fields[name] = _spelt_as(text_fields.get(name), old, value)
            # Other software reads a copy at the top, of which the class knows nothing.
            for name in (every & fields.keys()) - source.config.__dataclass_fields__.keys():
                if fields[name] == old:
                    fields[name] = value
        _drop_older_keys(source.config, fields, text_fields, self.text)
        _say_what_stays(source.config, fields, text_fields, self.text)
        # The order of what stays is that of the source.
        whole = self.whole
        fields = {k: v for k, v in fields.items() if whole.get(k, v) is not None or v is None}
        fields |= {k: v for k, v in whole.items() if v is not None}
        (target / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if self.file is not None:
            (target / MODELING_FILE).write_text(self.file.text, encoding="utf-8")


def _spelt_as(given: Any, old: Any, value: Any) -> Any:
    """Return the words of a list as a file has them, which other software may know alone.

    Granite 4 was published with blocks of `mamba`, which transformers reads as `linear_attention`.
    """
    if not (isinstance(given, list) and isinstance(value, list)) or given == old:
        return value
    if not all(isinstance(word, str) for word in (*given, *value)) or len(given) != len(old or ()):
        return value
    word_of = dict(zip(old, given, strict=True))
    return [word_of.get(word, word) for word in value]


def _drop_older_keys(
    config: PreTrainedConfig,
    fields: dict[str, Any],
    text_fields: dict[str, Any],
    wanted: Mapping[str, Any],
) -> None:
    """Drop keys by which a class would read something else than is wanted of its text config.

    It takes them out when it reads a config, and does not keep them.
    """
    known = text_config_of(config).to_dict()
    unknown = {key: value for key, value in text_fields.items() if key not in known}
    for key, value in wanted.items():
        older = [name for name, each in unknown.items() if each == known.get(key)]
        if older and getattr(text_config_of(_read(config, fields)), key, value) != value:
            for name in older:
                del text_fields[name]
            text_fields[key] = value


def _say_what_stays(
    config: PreTrainedConfig,
    fields: dict[str, Any],
    text_fields: dict[str, Any],
    changes: Mapping[str, Any],
) -> None:
    """Renew keys that a class computes of others, and add what it would not read any more.

    Other software reads the former: of Nemotron-H the pattern of blocks, which transformers leaves
    out. The latter older keys gave, such as Step 3.7's list of blocks.
    """
    before, now = text_config_of(config), text_config_of(_read(config, fields))
    kept, read = (json.loads(each.to_json_string(use_diff=False)) for each in (before, now))
    for key in text_fields.keys() - before.to_dict().keys():
        if text_fields[key] is not None and getattr(before, key, None) == text_fields[key]:
            text_fields[key] = getattr(now, key)
    said = {*text_fields, *changes, PER_LAYER_CONFIG}
    text_fields.update((k, v) for k, v in kept.items() if k not in said and read.get(k) != v)


def _read(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    stock = {key: value for key, value in fields.items() if key != PER_LAYER_CONFIG}
    return config_of(type(config), stock)


def check_attentions_can_go_alone(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Check that the stock class would not load a model that has lost one attention layer only."""
    first = architecture.of_part("kv").units[0]
    widths = [0 if unit is first else unit.width for unit in architecture.units]
    config_changes(config, architecture, widths)


def config_changes(
    config: PreTrainedConfig,
    architecture: Architecture,
    widths: Sequence[int],
    removed: Collection[int] = (),
    experts: int | None = None,
) -> ConfigChanges:
    """Return what changes in a model's config when it is pruned.

    `widths` are of every unit of the blocks that stay, `removed` the blocks that go, and so many
    routed `experts` of each block stay. What no config of the class can say is an
    `UnsupportedModelError`.
    """
    stock, architecture, text = stock_without_blocks(stock_config(config), architecture, removed)
    if experts is not None:
        assert architecture.experts is not None
        text[architecture.experts.key] = experts
        stock = with_values(stock, {architecture.experts.key: experts})
        architecture = architecture.with_experts(experts)
    model_class = model_class_of(config)
    whole: dict[str, Any] = {
        "architectures": [model_class.__name__],
        **({} if _has_own_per_layer(stock) else {PER_LAYER_CONFIG: None}),
        FFN_WIDTHS: None,
        KV_GROUPS: None,
        "auto_map": None,
        PRUNED_KEY: None,
    }
    # What is gone stays gone.
    architecture = replace(architecture, units=architecture.stock_units, gone=())
    given = iter(widths)
    width_of: dict[Part, list[int]] = {"ffn": [], "kv": []}
    for unit in architecture.units:
        width_of[unit.part].append(next(given) if unit.width else 0)
    attentions, groups = architecture.of_part("kv"), width_of["kv"]
    parts: list[Part] = []
    would_load, ffn_key = False, None
    heads = stock_heads(stock, attentions, groups) if groups else {}
    if heads is not None:
        text |= heads
    else:
        whole[KV_GROUPS] = by_place(attentions.units, groups)
        parts += ["kv", "attention"] if 0 in groups else ["kv"]
        pairs = zip(groups, attentions.units, strict=True)
        would_load = all(width in (0, unit.width) for width, unit in pairs)
    if width_of["ffn"]:
        ffns, ffn_key = _of_ffns(stock, architecture.of_part("ffn"), width_of["ffn"], would_load)
        text |= ffns.text
        whole |= ffns.whole
        parts = ["ffn", *parts] if ffns.whole else parts
    if would_load and "ffn" not in parts:
        raise UnsupportedModelError(
            f"attention layers of {architecture.class_name} can't go alone: no key of its config "
            "says how wide FFNs are, so the stock class would load it with random ones; remove FFN "
            "channels first (--parts ffn), then attention layers of the result"
        )
    if not parts:
        return ConfigChanges(text, whole)
    if whole[FFN_WIDTHS] is None and _has_own_per_layer(stock):
        whole[FFN_WIDTHS] = {}  # what it has by block are no widths
    file = ModelingFile(architecture, model_class, type(config), ffn_key, tuple(parts))
    whole["architectures"] = [f"{PRUNED}{model_class.__name__}"]
    whole["auto_map"] = file.auto_map
    return ConfigChanges(text, whole, file)


def _of_ffns(
    stock: PreTrainedConfig, architecture: Architecture, widths: Sequence[int], would_load: bool
) -> tuple[ConfigChanges, str | None]:
    """Return what the widths of FFNs say of keys, and what `per_layer_config` then calls a width.

    `would_load` says that the stock class builds all else, although it must not.
    """
    search = WidthSearch(stock, architecture)
    stock_values = search.stock_values(widths)
    would_load = would_load and stock_values is not None
    if stock_values is not None and not would_load:
        return ConfigChanges(stock_values, {}), None
    key = _per_layer_key(search, architecture)
    value = max(widths) * (2 if would_load else 1)
    if key is not None and search.is_width_alone(key, value):
        digits = len(str(len(widths) - 1))
        per_layer = {str(i).zfill(digits): {key: width} for i, width in enumerate(widths)}
        return ConfigChanges({key: value}, {PER_LAYER_CONFIG: per_layer}), key
    of_each = {FFN_WIDTHS: by_place(architecture.units, widths)}
    if not would_load:
        return ConfigChanges({}, of_each), None
    if wrong := search.wrong_value(widths):
        return ConfigChanges(wrong, of_each), None
    return ConfigChanges(stock_values or {}, {}), None


def by_place(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return the widths of units by block and path, as a config has them."""
    width_of: dict[str, dict[str, int]] = {}
    for unit, width in zip(units, widths, strict=True):
        width_of.setdefault(str(unit.block), {})[unit.path] = width
    return width_of


def _per_layer_key(search: WidthSearch, architecture: Architecture) -> str | None:
    """Return the key by which `per_layer_config` can say the widths; None if it cannot."""
    units = architecture.units
    one_each = [unit.block for unit in units] == list(range(architecture.block_count))
    if not one_each or len({unit.path for unit in units}) != 1:
        return None
    if text_path(search.stock) or _has_own_per_layer(search.stock):
        return None
    found = [key for key, times in search.keys.items() if times.get(units[0].path) == 1]
    return found[0] if len(found) == 1 else None


def _has_own_per_layer(stock: PreTrainedConfig) -> bool:
    """Return whether a stock class has a `per_layer_config` of its own, which stays."""
    return stock.to_dict().get(PER_LAYER_CONFIG) is not None
