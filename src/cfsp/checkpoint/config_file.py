"""config.json of a checkpoint, checked before anything is built from it.

Some numbers decide how much memory a model object takes, and transformers believes all of them.
So they are compared with what any model has before transformers sees them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from cfsp.architecture.model_classes import registered_classes
from cfsp.checkpoint.modeling_code import FFN_WIDTHS, KV_GROUPS, PER_LAYER_CONFIG
from cfsp.checkpoint.own_files import CONFIG_FILE, MODELING_FILE
from cfsp.checkpoint.quantisation import Quantisation, plain_fields, quantisation_in
from cfsp.checkpoint.tensor_file import INDEX_FILE, SINGLE_FILE
from cfsp.errors import (
    ELSEWHERE,
    CheckpointError,
    UnsupportedModelError,
    first_line,
    refusing_bad_json,
)

log = logging.getLogger(__name__)

_MOST_BLOCKS = 10_000
_MOST_EXPERTS = 1 << 16
# The first that a key's name fits says how large its value may be.
_LARGEST = (
    (re.compile(r"(num_hidden|n|num)_layers?"), _MOST_BLOCKS),
    (re.compile(r"vocab_size"), 1 << 28),
    (re.compile(r"max_position_embeddings|n_positions"), 1 << 40),
    (re.compile(r"(n|num)(_\w+)?_experts"), _MOST_EXPERTS),
    (
        re.compile(
            r"hidden_size|n_embd|d_model|head_dim|word_embed_proj_dim|n_inner|ffn_dim"
            r"|(n|num)_(attention_|key_value_)?heads?|(\w+_)?intermediate_size"
        ),
        1 << 24,
    ),
)

# Of reward models and the like; where embeddings are tied, files have all of a language model.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

_CORRECT = "correct it or download it again"
# What PEFT writes, and transformers adds to any weights that lie beside it.
_ADAPTER = "adapter_config.json"
# What ModelOpt writes, for a long time without a word in config.json.
_MODELOPT = "hf_quant_config.json"


def read_config(directory: Path) -> tuple[PreTrainedConfig, Quantisation | None]:
    """Return the config of the plain model in a directory, and how that is stored quantised."""
    path = directory / CONFIG_FILE
    if (directory / _ADAPTER).is_file():
        raise CheckpointError(
            f"{directory} has an adapter ({_ADAPTER}), which cfsp does not read: merge it with "
            "PEFT (merge_and_unload()) and save the whole model to another directory, or move the "
            "adapter's files out of this one"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a model directory: it has no {CONFIG_FILE}; give one that has it "
            "beside its safetensors, or a .gguf file by its path (hf download gets one from a "
            "repository)"
        )
    expected = f"is not a model config, JSON in UTF-8 that names a model_type; {_CORRECT}"
    with refusing_bad_json(path, expected):
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
        known = model_type in CONFIG_MAPPING
    if not known:
        newer = "install a version that knows it, or see what this one knows: cfsp families"
        raise UnsupportedModelError(
            f"model type {str(model_type)[:60]!r} is not known to transformers "
            f"{transformers.__version__}; {ELSEWHERE.get(str(model_type), newer)}"
        )
    _check_code(directory, fields)
    _check_numbers(path, fields)
    _check_generation_config(directory / GENERATION_CONFIG_NAME)
    for name in fields.get("architectures") or ():
        if name.endswith(_OTHER_HEADS):
            raise UnsupportedModelError(
                f"{directory} is a {name[:60]}, whose head is trained on something else than the "
                "next token; cfsp prunes language models"
            )
    if (named := fields.get("transformers_weights")) is not None:
        raise CheckpointError(
            f"{path} says that the weights are in {str(named)[:60]!r} (transformers_weights), "
            f"which cfsp reads as {SINGLE_FILE} or by {INDEX_FILE}: rename the file and remove "
            "the key"
        )
    if (directory / _MODELOPT).is_file():
        fields = {"quantization_config": {"quant_method": "modelopt"}, **fields}
    quantisation = quantisation_in(fields, str(directory))
    try:
        # Our own modelling file replaces only the model class: the stock config class fits.
        config = config_of(CONFIG_MAPPING[model_type], _plain(fields))
        if fields.get(PER_LAYER_CONFIG):
            list(config.per_layer_config)  # a config for every block is made only now
    except Exception as error:  # transformers validates with many exception types
        # Its validators say themselves only which of them it was.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _unusable(path, fields, first_line(cause)) from error
    return config, quantisation


def config_of(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config that a class reads of fields as they are in JSON."""

    def decoded(table: dict[str, Any]) -> Any:
        return float(table["__float__"]) if table.keys() == {"__float__"} else table

    return config_class.from_dict(json.loads(json.dumps(fields), object_hook=decoded))


def read_plain_fields(directory: Path) -> dict[str, Any]:
    """Return the fields of a directory's config.json without quantisation and foreign code."""
    return _plain(json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")))


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    found = plain_fields(fields)
    return {key: each for key, each in found.items() if key != "auto_map" or _is_ours(each)}


def _is_ours(auto_map: Any) -> bool:
    """Return whether no code but ours is named, of which only the name counts."""
    # cfsp builds such a model with its own copy.
    ours = f"{MODELING_FILE.removesuffix('.py')}.Pruned"
    return isinstance(auto_map or {}, dict) and all(
        str(name).startswith("AutoModel") and str(place).startswith(ours)
        for name, place in (auto_map or {}).items()
    )


def _check_code(directory: Path, fields: dict[str, Any]) -> None:
    """Check that the weights are what the stock class, or ours, computes with.

    Many that transformers has now were published with code, whose classes are called as its own.
    """
    named, model_type = fields.get("auto_map"), fields["model_type"]
    if _is_ours(named):
        return
    found = named if isinstance(named, dict) else {"AutoConfig": None}
    # Not a tokenizer's, which has its own rule.
    places = {key: at for key, at in found.items() if key.startswith(("AutoConfig", "AutoModel"))}
    # Some name another class there than they have, and no language model is built by it.
    if any(name.startswith("AutoModelFor") for name in places):
        places.pop("AutoModel", None)
    if not places:
        return
    if not all(
        _folded(str(place).rpartition(".")[2]) in _stock_names(name, CONFIG_MAPPING[model_type])
        for name, place in places.items()
    ):
        raise CheckpointError(
            f"{directory} brings its own modelling code, which may compute something else than the "
            f"stock {model_type} class; cfsp prunes stock models and its own output only"
        )
    _say_stock(directory, model_type)


def _stock_names(auto: str, config_class: type[PreTrainedConfig]) -> list[str]:
    """Return what transformers calls a class of configs, or its models of any Auto class."""
    if auto == "AutoConfig":
        return [_folded(config_class.__name__)]
    autos = {auto, "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    known = (each for each in autos if hasattr(transformers, each))
    classes = [found for each in known for found in registered_classes(each, config_class)]
    # EXAONE, whose own class is called after it, is a Llama here.
    own = config_class.__name__.removesuffix("Config")
    names = [each.config_class.__name__.removesuffix("Config") for each in classes]
    alike = [each.__name__.replace(name, own) for each, name in zip(classes, names, strict=True)]
    return [_folded(name) for name in (*(each.__name__ for each in classes), *alike)]


def _folded(name: str) -> str:
    """Return a name as transformers may spell it too: PhiMoEConfig there is PhimoeConfig."""
    return name.replace("_", "").lower()


@cache
def _say_stock(directory: Path, model_type: str) -> None:
    """Say once of a model that the code beside it is left out."""
    log.warning(
        "%s brings modelling code of its own: it is not run, and transformers' own %s class of "
        "the same name is taken, as without trust_remote_code",
        directory,
        model_type,
    )


def _check_generation_config(path: Path) -> None:
    """Check what travels along: with another kind of JSON transformers loads no model."""
    if path.is_file():
        with refusing_bad_json(path, f"is not a generation config; {_CORRECT}, or remove it"):
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise TypeError("it is no object")


def _check_numbers(path: Path, fields: dict[str, Any]) -> None:
    numbers = list(_numbers(fields))
    is_latent = any(key == "qk_rope_head_dim" for key, _ in numbers)
    for key, value in numbers:
        most = next((most for name, most in _LARGEST if name.fullmatch(key)), None)
        if most is None:
            continue
        # A mixture without shared experts says so by their number, or by their width; latent
        # attention without positions has no part of a head that is rotated.
        none = most == _MOST_EXPERTS or key.endswith("_intermediate_size")
        least = 0 if none or (is_latent and key == "head_dim") else 1
        # Some types give a list with a number for each block.
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not int or not least <= number <= most:
                wanted = f"expected a whole number from {least} to {most}"
                raise _unusable(path, fields, f"{key} is {value!r}, {wanted}")
    classes = fields.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        named = str(classes)[:40]
        raise _unusable(path, fields, f"architectures is {named}, expected names of classes")
    blocks = fields.get("num_hidden_layers", fields.get("n_layer"))
    blocks = blocks if type(blocks) is int else _MOST_BLOCKS
    # Keys are block numbers; transformers makes a config for each of them.
    for name in (PER_LAYER_CONFIG, FFN_WIDTHS, KV_GROUPS):
        entries = fields.get(name) or {}
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise _unusable(
                path, fields, f"{name} is {str(entries)[:40]}, expected a table of blocks"
            )
        for key in entries:
            if not str(key).isdecimal() or int(key) >= blocks:
                raise _unusable(path, fields, f"{name} speaks of a block {str(key)[:20]!r}")


def _numbers(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys that have a value, of the configs inside too."""
    for key, value in fields.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _numbers(value)
        elif value is not None:
            yield key, value


def _unusable(path: Path, fields: dict[str, Any], why: str) -> CheckpointError:
    model_type = str(fields["model_type"])[:60]
    return CheckpointError(f"{path} is not a usable {model_type} config: {why[:300]}; {_CORRECT}")
