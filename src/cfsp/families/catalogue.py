"""The language model types of the installed transformers, and what was proved of them before.

A family is built from a config of its type, with values by hand where the default one cannot be
built or run; real configs have these values.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cfsp.settings import PARTS, Part

# For each part why none of it can go; None if some can.
Reasons = dict[Part, str | None]

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_HEADS = {"head_dim": 128}
_OCR_EXPERTS = {"mlp_layer_types": ["dense"] + 31 * ["sparse"], "num_experts_per_tok": 6}
_COMPASS_ROPE = {"rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0},
}}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}  # fmt: skip

_VALUES: dict[str, dict[str, Any]] = {
    # The size of a head is computed from no default.
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": {
        "text_config": {
            **_HEADS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [16, 16, 16, 16],
            },
        }
    },
    "ministral": _HEADS,
    # Nor the number of key and value heads.
    "nemotron": {"num_key_value_heads": 48},
    # No number of experts, or of experts for a token.
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    # It is not said which blocks are which.
    "lfm2_moe": {"layer_types": 8 * ["conv", "conv", "conv", "full_attention"]},
    "deepseek_ocr2": {"text_config": _OCR_EXPERTS},
    # Sliding blocks without a window.
    "step3p7": {"text_config": {"sliding_window": 512}},
    # Two kinds of blocks need rotary parameters each.
    "cohere_compass_text": _COMPASS_ROPE,
    "cohere_compass": {"text_config": _COMPASS_ROPE},
    # Sparse blocks without the sizes of their indexer.
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    # 96 heads do not divide 4096, and the sections of rotary embeddings are those of half a head.
    "glm4v_moe": {
        "text_config": {
            **_HEADS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [8, 12, 12],
            },
        }
    },
    # 14 vision heads do not divide 1152.
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    # The ids of image tokens are looked up by name.
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGA": 4}},
    "emu3": {"vocabulary_map": {"<image>": 8711, "<|extra_200|>": 8710}},
    # It is not said which layers of the vision tower are used.
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
}


@dataclass(frozen=True)
class Family:
    """A model type and its class; multimodal types can have one with and one without pictures."""

    model_type: str
    class_name: str

    def class_and_config(self) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """Return the class and what it is built from, if one can be made."""
        import transformers

        model_class: type[PreTrainedModel] = getattr(transformers, self.class_name)
        values = copy.deepcopy(_VALUES.get(self.model_type, {}))
        config: PreTrainedConfig = transformers.CONFIG_MAPPING[self.model_type](**values)
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
