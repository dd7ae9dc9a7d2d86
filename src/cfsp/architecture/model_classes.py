"""Which transformers class a config belongs to, and a new model of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from cfsp.errors import CheckpointError, UnsupportedModelError, first_line

# What the classes that cfsp writes are called: that of transformers with this in front.
PRUNED = "Pruned"


def build_model(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a new model of a config, which stays as it is."""
    try:
        model: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # whatever a config's numbers and names make transformers do
        lacks = isinstance(error, ImportError)
        raise CheckpointError(
            f"no {config.model_type} model can be built from the numbers and names in config.json "
            f"({first_line(error)}); "
            f"{'install what it needs' if lacks else 'correct it or download it again'}"
        ) from error
    return model


def empty_stock_model(config: PreTrainedConfig, model_class: Any = None) -> PreTrainedModel:
    """Return the model that a stock class builds of a config, on the meta device."""
    with torch.device("meta"):
        return build_model(model_class or model_class_of(config), config, torch.float32)


def with_values(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config with other values of keys of its text config."""
    changed = copy.deepcopy(config)
    text_config = changed.get_text_config(decoder=True)
    for name, value in values.items():
        setattr(text_config, name, value)
    return changed


def identity_of(config: PreTrainedConfig) -> tuple[object, ...]:
    """Return what is the same of configs that build the same model: for what is kept of one.

    By the classes themselves: who works on one in a notebook defines it again by the same name.
    """
    return model_class_of(config), type(config), config.to_json_string(use_diff=False)


def registered_classes(auto: str, config_class: type[PreTrainedConfig]) -> list[Any]:
    """Return what an Auto class has for a class of configs, that which it builds first."""
    found = getattr(transformers, auto)._model_mapping.get(config_class, ())
    return list(found) if isinstance(found, tuple | list) else [found]


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the language model class of a config, with or without a vision tower.

    It is the class that the config names, of those that the Auto classes have for the config's
    class; else the first of these.
    """
    _check_is_decoder(config)
    found = registered_classes("AutoModelForCausalLM", type(config))
    found += registered_classes("AutoModelForImageTextToText", type(config))
    names = [name.removeprefix(PRUNED) for name in config.architectures or ()]
    # A multimodal config is in both mappings; in the first for its text decoder alone.
    text = config.sub_configs.get("text_config")
    whole = [each for each in found if text is None or each.config_class is not text]
    # The first of several is the one that AutoModel builds unless told otherwise.
    for model_class in (*(each for each in found if each.__name__ in names), *whole):
        return model_class  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"model type {config.model_type!r} has no class for causal language modelling or for text "
        f"from images in transformers {transformers.__version__}; expected one that "
        "AutoModelForCausalLM or AutoModelForImageTextToText knows; register a class of your own "
        "with AutoModelForCausalLM.register"
    )


def auto_classes_of(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> list[str]:
    """Return the Auto classes by which a language model is loaded; the one to name comes first."""
    names = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM")
    found = [name for name in names if model_class in registered_classes(name, config_class)]
    return found or ["AutoModelForCausalLM"]


def auto_class_of_type(model_type: str) -> str:
    """Return the Auto class by which models of a type are loaded."""
    reads_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"


def _check_is_decoder(config: PreTrainedConfig) -> None:
    """Check that a config is not that of an encoder, with or without a decoder behind it."""
    # Encoders are in the mapping of causal models too, for the configs with `is_decoder`.
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    found = None
    if getattr(config, "is_encoder_decoder", False):
        found = "an encoder with a decoder"
    elif is_encoder and not getattr(config, "is_decoder", False):
        found = "an encoder (its config does not say is_decoder)"
    if found is not None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is {found}; cfsp prunes decoder-only language models"
        )
