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
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

from cfsp.architecture.model_classes import auto_classes_of
from cfsp.architecture.resizing import (
    ConfigWith,
    Gone,
    remove_attentions,
    resize_attention,
    resize_ffn,
)
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MODELING_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture
    from cfsp.settings import Part

# Keys of config.json that give every FFN a width of its own: the one that transformers defines,
# for one FFN in each block, and ours for everything else.
PER_LAYER_CONFIG = "per_layer_config"
FFN_WIDTHS = "ffn_widths"
# That which gives every attention a number of KV groups of its own: 0 where there is none.
KV_GROUPS = "kv_groups"

_LINE = 100
_CHOOSES_EXPERTS = "@use_experts_implementation"


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
        module = MODELING_FILE.removesuffix(".py")
        whole = f"{module}.Pruned{self.model_class.__name__}"
        found = dict.fromkeys(auto_classes_of(self.model_class, self.config_class), whole)
        if self._base_class is not None:
            found = {"AutoModel": f"{module}.Pruned{self._base_class.__name__}", **found}
        elif self._auto_model is self.model_class:
            found = {"AutoModel": whole, **found}
        return found

    @cached_property
    def _base_class(self) -> type[PreTrainedModel] | None:
        """The class without the head; None where none stands between head and blocks."""
        if not self.architecture.blocks.startswith(f"{self.model_class.base_model_prefix}."):
            return None
        return self._auto_model

    @property
    def _auto_model(self) -> type[PreTrainedModel] | None:
        from transformers import AutoModel

        auto: Any = AutoModel
        found = auto._model_mapping.get(self.config_class, None)
        built: type[PreTrainedModel] | None = found[0] if isinstance(found, tuple) else found
        return built

    @cached_property
    def text(self) -> str:
        """The content of the file."""
        stock, blocks = self.model_class, self.architecture.blocks
        placed = [(stock, blocks)]
        if self._base_class is not None:
            in_base = blocks.removeprefix(f"{stock.base_model_prefix}.")
            placed.insert(0, (self._base_class, in_base))
        # Auto classes check that a class is for the config that it is registered with.
        is_shared = self.config_class is not stock.config_class
        has: dict[str, bool] = dict.fromkeys(self.parts, True)
        has |= {
            "per-layer": "ffn" in self.parts and self.width_key is not None,
            "by-path": "ffn" in self.parts and self.width_key is None,
            "of-transformers": stock.__module__.startswith("transformers."),
            "config-class": is_shared,
            "experts": _CHOOSES_EXPERTS in _source_of(stock),
        }
        template = resources.files("cfsp.checkpoint").joinpath("modeling_template.txt").read_text()
        before, each, after = _chosen(template, has).split("%each\n")
        classes = [
            each.replace("@STOCK@", of_class.__name__).replace("@BLOCKS@", path)
            for of_class, path in placed
        ]
        text = before + "".join(classes) + after
        imported = [*([self.config_class] if is_shared else []), *(each for each, _ in placed)]
        pairs = [f"    (Pruned{of.__name__}, {of.__name__})," for of, _ in placed]
        values = {"IMPORTS": self._imports(imported), "PAIRS": "\n".join(pairs)}
        for key, value in {**self._values(), **values}.items():
            text = text.replace(f"@{key}@", value)
        return text.rstrip() + "\n"

    def _values(self) -> dict[str, str]:
        """Return what stands for the names in the template, but for the classes."""
        units = self.architecture.stock_units
        ffns, attentions = ([unit for unit in units if unit.part == part] for part in ("ffn", "kv"))
        resizing: dict[str, tuple[Any, ...]] = {
            "kv": (resize_attention, ConfigWith),
            "attention": (remove_attentions, Gone),
        }
        sources = [resize_ffn, *(each for part in self.parts for each in resizing.get(part, ()))]
        ffn_key = FFN_WIDTHS if self.width_key is None else PER_LAYER_CONFIG
        keys = {"ffn": ffn_key, "kv": KV_GROUPS}
        words = {"ffn": ("FFN channels", "FFN"), "kv": ("KV groups", "attention")}
        channels, modules = zip(*(words[p] for p in self.parts if p in words), strict=True)
        # Blocks and path of attentions that are alike, and where those have heads.
        alike: dict[str, tuple[list[int], tuple[Any, ...]]] = {}
        for unit in attentions:
            places = unit.path, unit.plain_axes, list(unit.attributes), unit.config_numbers
            alike.setdefault(repr(places), ([], places))[0].append(unit.block)
        return {
            "CLASS": self.model_class.__name__,
            "CONFIG_CLASS": self.config_class.__name__,
            "MODEL_TYPE": self.config_class.model_type,
            "AUTO_CLASSES": ", ".join(self._auto_classes),
            "CHANNELS": " and ".join(channels),
            "FFN": " and every ".join(modules),
            "WIDTHS": "` and `".join(keys[part] for part in self.parts if part in keys),
            "RESIZE": "\n\n".join(map(inspect.getsource, sources)).rstrip(),
            "FFNS": _literal(
                {unit.path: (unit.plain_axes, list(unit.attributes)) for unit in ffns}
            ),
            "ATTENTIONS": _literal([(blocks, *places) for blocks, places in alike.values()]),
            "EXTRAS": _literal({unit.path: unit.extras for unit in attentions}),
            "PATH": ffns[0].path if ffns else "",
            "KEY": self.width_key or "",
        }

    @property
    def _auto_classes(self) -> list[str]:
        return [name for name in self.auto_map if name != "AutoModel"]

    def _imports(self, classes: Iterable[type]) -> str:
        import transformers

        names = defaultdict(list, transformers=list(self._auto_classes))
        for stock in classes:
            at_the_top = getattr(transformers, stock.__name__, None) is stock
            names["transformers" if at_the_top else stock.__module__].append(stock.__name__)
        return "\n".join(
            f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)
        )


def _chosen(template: str, has: Mapping[str, bool]) -> str:
    """Return the lines of a template that are not between an `%if` and an `%end` that exclude."""
    lines, shown = [], True
    for line in template.splitlines(keepends=True):
        if line.startswith("%if "):
            shown = has.get(line.split()[1], False)
        elif line == "%else\n":
            shown = not shown
        elif line == "%end\n":
            shown = True
        elif shown:
            lines.append(line)
    return "".join(lines)


def _literal(value: Any) -> str:
    return pformat(value, width=_LINE, sort_dicts=False)


def pruned_class(file: ModelingFile) -> type[PreTrainedModel]:
    """Return the class of a model whose FFNs have the widths that its config names."""
    # Imported as transformers imports it from a checkpoint, so that it saves its modelling file.
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    code = file.text.encode()
    # Kept in the cache that it is imported through; a temporary place would outlive a kill.
    name = f"cfsp_{file.model_class.__name__}_{hashlib.sha256(code).hexdigest()[:12]}"
    path = _modules_cache() / "cfsp_sources" / name / MODELING_FILE
    if not path.is_file() or path.read_bytes() != code:
        write_atomically(path, code)
    auto_class = auto_classes_of(file.model_class, file.config_class)[0]
    loaded: Any = get_class_from_dynamic_module(file.auto_map[auto_class], str(path.parent))
    loaded.register_for_auto_class(auto_class)
    return loaded  # type: ignore[no-any-return]


def _modules_cache() -> Path:
    """Return where transformers imports code from; a place of our own if nobody can write there."""
    from transformers import dynamic_module_utils

    place = Path(dynamic_module_utils.HF_MODULES_CACHE)
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    own = tempfile.mkdtemp(prefix="cfsp-modules-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    dynamic_module_utils.HF_MODULES_CACHE = own
    return Path(own)


def _source_of(model_class: type[PreTrainedModel]) -> str:
    """Return the text of the file that a class is in; empty if there is none."""
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError):
        return ""
