"""config.json of a checkpoint, checked before anything is built from it.

Some numbers decide how much memory a model object takes, and transformers believes all of them.
So they are compared with what any model has before transformers sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.families import Family, check_is_text_only, family_of_type, intermediate_sizes
from cfsp.checkpoint.modeling_code import auto_map
from cfsp.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_FILE = "config.json"

_MOST_BLOCKS = 10_000
_LARGEST_DIMENSION = 1 << 24
_LARGEST_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _MOST_BLOCKS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "num_attention_heads", "n_head", "num_key_value_heads",
         "head_dim", "word_embed_proj_dim", "shared_expert_intermediate_size"),
        _LARGEST_DIMENSION,
    ),
    "vocab_size": 1 << 28,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1 << 40),
}  # fmt: skip
_MOST_EXPERTS = 1 << 16

_CORRECT = "correct it or download it again"


def read_config(directory: Path) -> PreTrainedConfig:
    """Return the config of a model directory.

    Raises:
        CheckpointError: there is none, or it is no config that a model can be built from.
        UnsupportedModelError: the family is not in the table.
    """
    from transformers import CONFIG_MAPPING

    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no {CONFIG_FILE}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
        check_is_text_only(fields)
        family = family_of_type(model_type)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a model config: it names no model_type; {_CORRECT}"
        ) from error
    _check_code(directory, fields, family)
    _check_numbers(path, fields, family)
    try:
        # Our own modelling file replaces only the model class: the stock config class fits.
        config: PreTrainedConfig = CONFIG_MAPPING[family.model_type].from_pretrained(directory)
        widths = intermediate_sizes(config)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers validates with many exception types
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _unusable(path, family, summary) from error
    for block, width in enumerate(widths):
        if not 0 < width <= _LARGEST_DIMENSION:
            raise _unusable(path, family, f"block {block} has {width} FFN channels")
    return config


def _check_code(directory: Path, fields: dict[str, Any], family: Family) -> None:
    """Check that the weights are what the stock class, or ours, computes with."""
    # Of our own code only the name counts: cfsp builds such a model with its own copy.
    named = fields.get("auto_map") or {}
    if not isinstance(named, dict) or not named.items() <= auto_map(family).items():
        raise CheckpointError(
            f"{directory} brings its own modelling code, which may compute something else than "
            f"the stock {family.causal_lm}; cfsp prunes stock models and its own output only"
        )
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{directory} is quantised ({method}); cfsp prunes plain weights: save the model in "
            "float32, bfloat16 or float16 first, and quantise the result"
        )


def _check_numbers(path: Path, fields: dict[str, Any], family: Family) -> None:
    limits = {**_LARGEST_COUNTS, family.width_key: _LARGEST_DIMENSION}
    if family.experts is not None:
        limits[family.experts.count_key] = _MOST_EXPERTS
    for key, most in limits.items():
        value = fields.get(key)
        if value is not None and not _is_count(value, most):
            raise _unusable(
                path, family, f"{key} is {value!r}, expected a whole number from 1 to {most}"
            )
    blocks = fields.get("num_hidden_layers", fields.get("n_layer")) or _MOST_BLOCKS
    # Keys are block numbers; transformers makes a config for each of them.
    for key in fields.get("per_layer_config") or ():
        if not str(key).isdecimal() or int(key) >= blocks:
            raise _unusable(path, family, f"per_layer_config speaks of a block {str(key)[:20]!r}")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _unusable(path: Path, family: Family, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a usable {family.model_type} config: {why[:300]}; {_CORRECT}"
    )
