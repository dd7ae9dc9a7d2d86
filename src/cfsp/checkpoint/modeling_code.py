"""The modelling file that travels with a checkpoint whose widths no stock config can give.

It builds the stock model and then resizes, in place, the FFNs and attentions that config.json
names. Decoder layers keep the very config object of the model: with copies,
`set_attn_implementation` would not reach them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import inspect
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pprint import pformat
from typing import Any

import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedConfig, PreTrainedModel, dynamic_module_utils

from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import PRUNED, auto_classes_of, registered_classes
from cfsp.architecture.resizing import (
    ConfigWith,
    Gone,
    remove_attentions,
    resize_attention,
    resize_ffn,
)
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.settings import PART_NOUNS, UNIT_PARTS, Part

# Keys of config.json that give every FFN a width of its own: the one that transformers defines,
# for one FFN in each block, and ours for everything else.
PER_LAYER_CONFIG = "per_layer_config"
FFN_WIDTHS = "ffn_widths"
# That which gives every attention a number of KV groups of its own: 0 where there is none.
KV_GROUPS = "kv_groups"

_TEMPLATES = Environment(
    loader=PackageLoader("cfsp", "checkpoint"), undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class ModelingFile:
    """The modelling file for one architecture, whose widths do not matter."""

    architecture: Architecture
    model_class: type[PreTrainedModel]  # the stock class with the head
    config_class: type[PreTrainedConfig]  # several types may share a model class
    width_key: str | None  # what `per_layer_config` calls the width of FFNs
    parts: tuple[Part, ...]  # which of the architecture's units are resized

    @property
    def auto_map(self) -> dict[str, str]:
        """The `auto_map` of config.json that points at the file."""
        named = dict.fromkeys(self._auto_classes, self.model_class)
        if self._base_class is not None:
            named = {"AutoModel": self._base_class, **named}
        module = MODELING_FILE.removesuffix(".py")
        return {auto: f"{module}.{PRUNED}{of.__name__}" for auto, of in named.items()}

    @property
    def _auto_classes(self) -> list[str]:
        return auto_classes_of(self.model_class, self.config_class)

    @cached_property
    def _base_class(self) -> type[PreTrainedModel] | None:
        """The class that AutoModel builds; None where the blocks are not in it."""
        found = registered_classes("AutoModel", self.config_class)
        built: type[PreTrainedModel] | None = found[0] if found else None
        in_base = self.architecture.blocks.startswith(f"{self.model_class.base_model_prefix}.")
        return built if in_base or built is self.model_class else None

    @cached_property
    def text(self) -> str:
        """The content of the file."""
        stock, blocks = self.model_class, self.architecture.blocks
        placed = {stock: blocks}
        if self._base_class is not None:
            placed = {
                self._base_class: blocks.removeprefix(f"{stock.base_model_prefix}."),
                **placed,
            }
        # Auto classes check that a class is for the config that it is registered with.
        is_shared = self.config_class is not stock.config_class
        imported = defaultdict(list, transformers=list(self._auto_classes))
        for each in (*([self.config_class] if is_shared else []), *placed):
            at_the_top = getattr(transformers, each.__name__, None) is each
            imported["transformers" if at_the_top else each.__module__].append(each.__name__)
        text = _TEMPLATES.get_template("modeling_template.txt").render(
            name=stock.__name__,
            placed=list(placed.items()),
            imported=sorted(imported.items()),
            config_class=self.config_class,
            is_shared=is_shared,
            auto_classes=self._auto_classes,
            parts=self.parts,
            key=self.width_key,
            of_transformers=stock.__module__.startswith("transformers."),
            chooses_experts=stock._can_set_experts_implementation(),
            **self._places(),
        )
        return text.rstrip() + "\n"

    def _places(self) -> dict[str, Any]:
        """Return where a model has what is resized, and the code that resizes it."""
        literal = partial(pformat, width=100, sort_dicts=False)
        ffns, attentions = (self.architecture.of_part(part).stock_units for part in UNIT_PARTS)
        words = {
            "ffn": ("FFN", PER_LAYER_CONFIG if self.width_key else FFN_WIDTHS),
            "kv": ("attention", KV_GROUPS),
        }
        resizing: dict[str, tuple[Any, ...]] = {
            "kv": (resize_attention, ConfigWith),
            "attention": (remove_attentions, Gone),
        }
        sources = [resize_ffn, *(each for part in self.parts for each in resizing.get(part, ()))]
        # Blocks and path of attentions that are alike, and where those have heads.
        alike: dict[str, tuple[list[int], tuple[Any, ...]]] = {}
        for unit in attentions:
            places = unit.path, unit.plain_axes, list(unit.attributes), unit.config_numbers
            alike.setdefault(repr(places), ([], places))[0].append(unit.block)
        return {
            "words": [(PART_NOUNS[part], *words[part]) for part in self.parts if part in words],
            "resize": "\n\n".join(map(inspect.getsource, sources)).rstrip(),
            "ffns": literal({unit.path: (unit.plain_axes, list(unit.attributes)) for unit in ffns}),
            "attentions": literal([(blocks, *places) for blocks, places in alike.values()]),
            "extras": literal({unit.path: unit.extras for unit in attentions}),
            "path": ffns[0].path if ffns else "",
        }


def pruned_class(file: ModelingFile) -> type[PreTrainedModel]:
    """Return the class of a model whose FFNs have the widths that its config names."""
    # Imported as transformers imports it from a checkpoint, so that it saves its modelling file.
    code = file.text.encode()
    # Kept in the cache that it is imported through; a temporary place would outlive a kill.
    name = f"cfsp_{file.model_class.__name__}_{hashlib.sha256(code).hexdigest()[:12]}"
    path = _modules_cache() / "cfsp_sources" / name / MODELING_FILE
    if not path.is_file() or path.read_bytes() != code:
        write_atomically(path, code)
    auto_class = file._auto_classes[0]
    loaded: Any = dynamic_module_utils.get_class_from_dynamic_module(
        file.auto_map[auto_class], str(path.parent)
    )
    loaded.register_for_auto_class(auto_class)
    return loaded  # type: ignore[no-any-return]


def _modules_cache() -> Path:
    """Return where transformers imports code from; a place of our own if nobody can write there."""
    place = Path(dynamic_module_utils.HF_MODULES_CACHE)
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    own = tempfile.mkdtemp(prefix="cfsp-modules-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    dynamic_module_utils.HF_MODULES_CACHE = own
    return Path(own)
