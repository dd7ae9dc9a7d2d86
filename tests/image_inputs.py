"""Tokens with an image among them, for the tiny multimodal models of `tiny_decoders`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfsp.text.windows import Windows

BEFORE, AFTER = [0, 20, 21], [30, 31, 32, 33]

# How many tokens the image becomes.
IMAGE_TOKENS = {
    "gemma3": 4, "gemma4": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "mistral3": 2,
    "llava_onevision": 10, "internvl": 1, "smolvlm": 1, "llama4": 1, "paligemma": 4, "glm4v": 4,
    "qwen3_5": 4, "llava": 4,
}  # fmt: skip

# Images as rows of patches, with a number of rows and columns beside.
_IN_A_GRID = ("qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5")


def image_inputs(model_type: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return what a processor would make of an image with a few words before and behind."""
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    tokens_BT = torch.tensor([[*BEFORE, *IMAGE_TOKENS[model_type] * [image], *AFTER]])
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    inputs |= _pixels(model_type, config)
    if model_type in _IN_A_GRID:
        inputs["mm_token_type_ids"] = (tokens_BT == image).int()
    if model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(tokens_BT)
    return inputs


def image_windows(model_type: str, model: Any) -> Windows:
    """Return a window with an image and one without."""
    inputs = image_inputs(model_type, model.config)
    tokens_BT = inputs.pop("input_ids")
    del inputs["attention_mask"]
    if model_type == "gemma3":
        inputs["token_type_ids"] = (tokens_BT == model.config.image_token_id).int()
    text_BT = tokens_BT.clamp(max=290)
    return Windows(torch.cat([tokens_BT, text_BT]), {}, images_N=(inputs, {}))


def _pixels(model_type: str, config: Any) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0))

    tower = config.vision_config
    if model_type in _IN_A_GRID:
        values = 3 * tower.temporal_patch_size * tower.patch_size**2
        return {"pixel_values": random(16, values), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if model_type == "gemma4":
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        values = 3 * tower.patch_size**2
        return {"pixel_values": random(1, 36, values), "image_position_ids": places[None]}
    if model_type == "mistral3":  # two images
        return {"pixel_values": random(2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]] * 2)}
    if model_type == "llava_onevision":  # the image as a whole, and its only part
        return {"pixel_values": random(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    if model_type == "smolvlm":
        return {"pixel_values": random(1, 1, 3, 28, 28)}
    side = 56 if model_type == "gemma3" else 28
    return {"pixel_values": random(1, 3, side, side)}
