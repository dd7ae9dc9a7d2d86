"""The language model types of the installed transformers, and what was proved of them before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from cfsp.settings import PARTS, Part

# For each part why none of it can go; None if some can.
Reasons = dict[Part, str | None]

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A model type and its class; multimodal types can have one with and one without pictures."""

    model_type: str
    class_name: str

    def class_and_config(self) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """Return the class and what it is built from.

        Raises:
            Exception: there is no such class, or no config of the type can be made.
        """
        import transformers

        from cfsp.families.default_configs import default_config

        model_class: type[PreTrainedModel] = getattr(transformers, self.class_name)
        config = default_config(self.model_type)
        # A multimodal type's class for text alone is built from the config of its text decoder.
        if model_class.config_class is config.sub_configs.get("text_config"):
            config = config.get_text_config()
        return model_class, config


def installed_families() -> list[Family]:
    """Return what transformers has for language modelling and for text from images."""
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    # The first of several classes is the one that the Auto class builds unless told otherwise.
    pairs = {
        (model_type, names if isinstance(names, str) else names[0])
        for mapping in mappings
        for model_type, names in mapping.items()
        if model_type in modeling_auto.CONFIG_MAPPING_NAMES  # not what our modelling file adds
    }
    return [Family(model_type, class_name) for model_type, class_name in sorted(pairs)]


def proved_before() -> tuple[str, dict[Family, Reasons]]:
    """Return what `make families` found: the version of transformers, and why not for each part."""
    found = json.loads(files("cfsp.families").joinpath("proved.json").read_text(encoding="utf-8"))
    return found["transformers"], {
        Family(row["model_type"], row["class"]): {part: row["why_not"].get(part) for part in PARTS}
        for row in found["families"]
    }
