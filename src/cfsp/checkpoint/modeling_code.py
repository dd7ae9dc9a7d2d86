"""The modelling file that travels with a checkpoint whose widths no stock config can give.

It builds the stock model and then resizes, in place, the FFNs and attentions that config.json
names. Decoder
layers keep the very config object of the model: with copies, `set_attn_implementation` would not
reach them.
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
from collections.abc import Iterable, Sequence
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
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture, Unit
    from cfsp.settings import Part

# Keys of config.json that give every FFN a width of its own: the one that transformers defines,
# for one FFN in each block, and ours for everything else.
PER_LAYER_CONFIG = "per_layer_config"
FFN_WIDTHS = "ffn_widths"
# That which gives every attention a number of KV groups of its own: 0 where there is none.
KV_GROUPS = "kv_groups"

_LINE = 100

_ABOUT_EXPERTS = """
# The experts of the stock class are decorated with @use_experts_implementation: transformers
# looks for that word in the file of a class to learn whether it may choose how experts run.
"""

_CHOOSES_EXPERTS = "@use_experts_implementation"

_TABLE_OF_FFNS = """
# By the path of an FFN in its block: each parameter that has the FFN's channels, with the axis and
# how often a channel is on it; and each number that tells the width, with how often it does.
FFNS = @FFNS@
"""

_TABLE_OF_ATTENTIONS = """
# Blocks whose attentions are alike, and where those are: each parameter that has heads, with the
# axis and how many entries of it a head of keys and values has with the query heads that read it;
# each number that tells how many there are, in a module and in the config that it reads.
ATTENTIONS = @ATTENTIONS@
"""

_TABLE_OF_EXTRAS = """
# How many values an attention returns besides its output, by the path of the attention; None if it
# returns a tensor.
EXTRAS = @EXTRAS@
"""

_NARROW_FFNS = """
def _narrow(blocks, width_of):
    \"\"\"Give every FFN the width that `width_of` names by block and path.\"\"\"
    for block, widths in width_of.items():
        for path, width in widths.items():
            resize_ffn(blocks[int(block)], width, *FFNS[path])
"""

_NARROW_ATTENTIONS = """
def _drop_groups(blocks, groups_of):
    \"\"\"Give every attention the KV groups that `groups_of` names by block and path.\"\"\"
    for alike, path, *places in ATTENTIONS:
        for block in alike:
            resize_attention(blocks[block], path, groups_of[str(block)][path], *places)
"""

_DROP_ATTENTIONS = """
def _drop_attentions(blocks, config):
    \"\"\"Take out the attentions that have no KV group left.\"\"\"
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    remove_attentions(blocks, config.kv_groups, EXTRAS, kinds)
"""

_TAKE_FFN_WIDTHS = """
def _take_widths(config):
    \"\"\"Return the width of every FFN, by block and path.\"\"\"
    return config.ffn_widths
"""

_TAKE_PER_LAYER_CONFIG = """
def _take_widths(config):
    \"\"\"Return the width of every FFN; make the config uniform while the model is built.\"\"\"
    layers, config.per_layer_config = list(config.per_layer_config), None
    return {index: {"@PATH@": layer.@KEY@} for index, layer in enumerate(layers)}


def _give_back(config, width_of):
    \"\"\"Give the config its widths back.\"\"\"
    config.per_layer_config = {i: {"@KEY@": of["@PATH@"]} for i, of in width_of.items()}
"""

_OF_TRANSFORMERS = """
class _OfTransformers:
    \"\"\"All modules are of transformers, which shall initialise their buffers.\"\"\"

    @classmethod
    def is_custom_code(cls):
        return False
"""

_CLASS = """

class Pruned@CLASS@(@FIRST@@CLASS@):
@CONFIG_CLASS@    def __init__(self, config, *args, **kwargs):
@TAKE_WIDTHS@        super().__init__(config, *args, **kwargs)
"""

_TAKE_WIDTHS = "        width_of = _take_widths(config)\n"
_GIVE_WIDTHS = '        _narrow(attrgetter("@BLOCKS@")(self), width_of)\n'
_GIVE_GROUPS = '        _drop_groups(attrgetter("@BLOCKS@")(self), config.kv_groups)\n'
_REMOVE = '        _drop_attentions(attrgetter("@BLOCKS@")(self), config)\n'
_GIVE_BACK = "        _give_back(config, width_of)\n"


@dataclass(frozen=True)
class ModelingFile:
    """The modelling file for one architecture.

    Attributes:
        architecture: what is resized; its widths do not matter.
        model_class: the stock class with the head.
        config_class: of the model's config; several types may share a model class.
        width_key: what `per_layer_config` calls the width of FFNs; None where it has none.
        parts: which of the architecture's units are resized.
    """

    architecture: Architecture
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    width_key: str | None
    parts: tuple[Part, ...] = ("ffn",)

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

    @property
    def auto_class(self) -> str:
        """The Auto class that the model with the head is loaded by."""
        return auto_classes_of(self.model_class, self.config_class)[0]

    @cached_property
    def _base_class(self) -> type[PreTrainedModel] | None:
        """The class without the head; None where none stands between head and blocks."""
        if not self.architecture.blocks.startswith(f"{self.model_class.base_model_prefix}."):
            return None
        return self._auto_model

    @property
    def _auto_model(self) -> type[PreTrainedModel] | None:
        """What AutoModel builds from the same config."""
        from transformers import AutoModel

        auto: Any = AutoModel
        found = auto._model_mapping.get(self.config_class, None)
        built: type[PreTrainedModel] | None = found[0] if isinstance(found, tuple) else found
        return built

    @cached_property
    def text(self) -> str:
        """The content of the file."""
        blocks = self.architecture.blocks
        placed = [(self.model_class, blocks)]
        if self._base_class is not None:
            in_base = blocks.removeprefix(f"{self.model_class.base_model_prefix}.")
            placed.insert(0, (self._base_class, in_base))
        units = self.architecture.stock_units
        ffns, attentions = ([unit for unit in units if unit.part == part] for part in ("ffn", "kv"))
        in_class, tables, resize, narrow, keys = _CLASS, "", "", "", []
        give_back = ""
        if "ffn" in self.parts:
            has_key = self.width_key is not None
            keys.append(PER_LAYER_CONFIG if has_key else FFN_WIDTHS)
            tables += _TABLE_OF_FFNS.replace("@FFNS@", _literal(_table_of_ffns(ffns)))
            narrow += (_TAKE_PER_LAYER_CONFIG if has_key else _TAKE_FFN_WIDTHS) + "\n"
            narrow += _NARROW_FFNS
            in_class += _GIVE_WIDTHS
            give_back = _GIVE_BACK if has_key else ""
        resize = inspect.getsource(resize_ffn)
        if "kv" in self.parts:
            keys.append(KV_GROUPS)
            table = _literal(_table_of_attentions(attentions))
            tables += _TABLE_OF_ATTENTIONS.replace("@ATTENTIONS@", table)
            for each in (resize_attention, ConfigWith):
                resize += "\n\n" + inspect.getsource(each)
            narrow += "\n" * bool(narrow) + _NARROW_ATTENTIONS
            in_class += _GIVE_GROUPS
        has_gone = "attention" in self.parts
        if has_gone:
            extras = {unit.path: unit.extras for unit in attentions}
            tables += _TABLE_OF_EXTRAS.replace("@EXTRAS@", _literal(extras))
            for new in (remove_attentions, Gone):
                resize += "\n\n" + inspect.getsource(new)
            narrow += "\n" + _DROP_ATTENTIONS
            in_class += _REMOVE
        take = _TAKE_WIDTHS if "ffn" in self.parts else ""
        in_class = in_class.replace("@TAKE_WIDTHS@", take) + give_back
        is_of_transformers = self.model_class.__module__.startswith("transformers.")
        # Auto classes check that a class is for the config that it is registered with.
        is_shared = self.config_class is not self.model_class.config_class
        config_line = f"    config_class = {self.config_class.__name__}\n\n" if is_shared else ""
        classes = [
            in_class.replace("@CONFIG_CLASS@", config_line)
            .replace("@FIRST@", "_OfTransformers, " if is_of_transformers else "")
            .replace("@CLASS@", stock.__name__)
            .replace("@BLOCKS@", path)
            for stock, path in placed
        ]
        imported = [*([self.config_class] if is_shared else []), *(stock for stock, _ in placed)]
        pairs = [f"(Pruned{stock.__name__}, {stock.__name__})" for stock, _ in placed]
        words = {"ffn": ("FFN channels", "FFN"), "kv": ("KV groups", "attention")}
        resized = [words[part] for part in self.parts if part in words]
        channels, modules = zip(*resized, strict=True)
        auto_classes = [name for name in self.auto_map if name != "AutoModel"]
        values = {
            "AUTO_CLASSES": ", ".join(auto_classes),
            "CLASS": self.model_class.__name__,
            "CHANNELS": " and ".join(channels),
            "WIDTHS": "` and `".join(keys),
            "FFN": " and every ".join(modules),
            "TYPING": "from typing import Any\n\n" if "kv" in self.parts else "",
            "DEFAULTDICT": "from collections import defaultdict\n" if has_gone else "",
            "SEQUENCE": ", Sequence" if has_gone else "",
            "IMPORTS": _imports(imported, auto_classes),
            "TABLES": tables.strip(),
            "RESIZE": resize.rstrip(),
            "NARROW": narrow.strip(),
            "PATH": ffns[0].path if ffns else "",
            "KEY": self.width_key or "",
            "OF_TRANSFORMERS": _OF_TRANSFORMERS if is_of_transformers else "",
            "CLASSES": "".join(classes).strip(),
            "PAIRS": "".join(f"    {pair},\n" for pair in pairs),
            "MODEL_TYPE": self.config_class.model_type,
            "EXPERTS": _ABOUT_EXPERTS if _CHOOSES_EXPERTS in _source_of(self.model_class) else "",
        }
        text = resources.files("cfsp.checkpoint").joinpath("modeling_template.txt").read_text()
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        return text.rstrip() + "\n"


def resized_attention(block: nn.Module, unit: Unit, groups: int) -> None:
    """Give an attention of a block another number of KV groups, as the modelling file does it."""
    numbers = dict(unit.config_numbers)
    axes, attributes = unit.plain_axes, unit.plain_attributes
    resize_attention(block, unit.path, groups, axes, attributes, numbers)


def _table_of_ffns(units: Sequence[Unit]) -> dict[str, Any]:
    """Return what the modelling file has to know of FFNs, by their path."""
    return {unit.path: (unit.plain_axes, unit.plain_attributes) for unit in units}


def _table_of_attentions(units: Sequence[Unit]) -> list[tuple[Any, ...]]:
    """Return what it has to know of attentions: blocks, path, and where those have heads."""
    alike: dict[str, tuple[list[int], tuple[Any, ...]]] = {}
    for unit in units:
        places = unit.path, unit.plain_axes, unit.plain_attributes, dict(unit.config_numbers)
        alike.setdefault(repr(places), ([], places))[0].append(unit.block)
    return [(blocks, *places) for blocks, places in alike.values()]


def _literal(value: Any) -> str:
    return pformat(value, width=_LINE, sort_dicts=False)


def is_only_code(directory: Path, file: ModelingFile) -> bool:
    """Return whether the directory's only code is a modelling file exactly as we write it."""
    sources = [path for path in directory.glob("*.py") if path.is_file()]
    if [path.name for path in sources] != [MODELING_FILE]:
        return False
    return sources[0].read_bytes() == file.text.encode()


def pruned_class(file: ModelingFile) -> type[PreTrainedModel]:
    """Return the class of a model whose FFNs have the widths that its config names.

    It is imported in the same way as transformers imports it from a checkpoint, so a model of
    this class saves its modelling file with `save_pretrained`.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    code = file.text.encode()
    # Kept in the cache that it is imported through; a temporary place would outlive a kill.
    name = f"cfsp_{file.model_class.__name__}_{hashlib.sha256(code).hexdigest()[:12]}"
    path = _modules_cache() / "cfsp_sources" / name / MODELING_FILE
    if not path.is_file() or path.read_bytes() != code:
        write_atomically(path, code)
    loaded: Any = get_class_from_dynamic_module(file.auto_map[file.auto_class], str(path.parent))
    loaded.register_for_auto_class(file.auto_class)
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


def _imports(classes: Iterable[type], auto_classes: Sequence[str]) -> str:
    """Return the lines that import classes of transformers, and what renames stored tensors."""
    import transformers

    names = defaultdict(list, transformers=list(auto_classes))
    for stock in classes:
        at_the_top = getattr(transformers, stock.__name__, None) is stock
        names["transformers" if at_the_top else stock.__module__].append(stock.__name__)
    lines = [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    return "\n".join(
        [
            *lines,
            "from transformers.conversion_mapping import (",
            "    get_checkpoint_conversion_mapping,",
            "    register_checkpoint_conversion_mapping,",
            ")",
        ]
    )
