"""Real processors for the tiny multimodal models of `tiny_decoders`, and sets of tiny pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from conftest import byte_tokenizer, random_prose
from tiny_decoders import tiny_model

# By the ids that `tiny_decoders` gives them.
SPECIAL = {
    "image_token": "<image>", "video_token": "<video>", "audio_token": "<audio>",
    "boi_token": "<boi>", "eoi_token": "<eoi>", "boa_token": "<boa>", "eoa_token": "<eoa>",
    "vision_start_token": "<vstart>", "vision_end_token": "<vend>",
}  # fmt: skip
FIRST_SPECIAL = 300

# What a template writes for an image.
PLACES = {
    "gemma3": "<boi>",
    "qwen2_5_vl": "<vstart><image><vend>",
    "qwen3_vl": "<vstart><image><vend>",
}

TYPES = (
    "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "idefics3", "mistral3", "paligemma",
    "llava_onevision",
)  # fmt: skip


def template_of(model_type: str) -> str:
    place = PLACES.get(model_type, "<image>")
    return (
        "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + place + "{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}\n{% endfor %}"
    )


def image_tokenizer(directory: Path, *, bos: bool = False) -> Any:
    """Return a byte-level tokenizer with the special tokens of images."""
    found = byte_tokenizer(directory, FIRST_SPECIAL, bos=bos, extra_special_tokens=SPECIAL)
    assert found.convert_tokens_to_ids("<image>") == FIRST_SPECIAL, len(found)
    return found


def tiny_processor(model_type: str, tokenizer: Any) -> Any:
    """Return the processor that fits a type's tiny model."""
    import transformers as t

    template = {"chat_template": template_of(model_type)}
    square = {"height": 28, "width": 28}
    if model_type == "llava":
        pictures = t.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
        return t.LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, **template,
        )  # fmt: skip
    if model_type in ("qwen2_5_vl", "qwen3_vl"):
        sizes = {"patch_size": 14}
        pixels = {"shortest_edge": 28 * 28, "longest_edge": 64 * 64}
        pictures = t.Qwen2VLImageProcessorPil(size=pixels, **sizes)
        if model_type == "qwen2_5_vl":
            videos = t.Qwen2VLVideoProcessor(size=pixels, **sizes)
            return t.Qwen2_5_VLProcessor(pictures, tokenizer, videos, **template)
        videos = t.Qwen3VLVideoProcessor(size=pixels, **sizes)
        return t.Qwen3VLProcessor(pictures, tokenizer, videos, **template)
    if model_type == "gemma3":
        pictures = t.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        return t.Gemma3Processor(pictures, tokenizer, image_seq_length=4, **template)
    if model_type in ("smolvlm", "idefics3"):
        edges = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
        if model_type == "idefics3":
            pictures = t.Idefics3ImageProcessorPil(do_image_splitting=False, **edges)
            return t.Idefics3Processor(pictures, tokenizer, image_seq_len=1, **template)
        pictures = t.SmolVLMImageProcessorPil(do_image_splitting=False, **edges)
        videos = t.SmolVLMVideoProcessor(**edges)
        return t.SmolVLMProcessor(pictures, tokenizer, videos, image_seq_len=1, **template)
    if model_type == "mistral3":
        pictures = t.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size=14)
        return t.PixtralProcessor(
            pictures, tokenizer, patch_size=14, spatial_merge_size=2, image_token="<image>",
            image_break_token="<boi>", image_end_token="<eoi>", **template,
        )  # fmt: skip
    if model_type == "paligemma":
        pictures = t.SiglipImageProcessorPil(size=square)
        pictures.image_seq_length = 4
        return t.PaliGemmaProcessor(pictures, tokenizer, **template)
    assert model_type == "llava_onevision", model_type
    pictures = t.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=[[28, 28]])
    videos = t.LlavaOnevisionVideoProcessor(size=square)
    return t.LlavaOnevisionProcessor(
        pictures, tokenizer, videos, num_image_tokens=4, vision_feature_select_strategy="full",
        **template,
    )  # fmt: skip


def save_multimodal(model_type: str, tokenizer: Any, directory: Path) -> PreTrainedModel:
    """Save a tiny model with its processor."""
    model = tiny_model(model_type)
    model.save_pretrained(directory)
    tiny_processor(model_type, tokenizer).save_pretrained(directory)
    return model


def picture(seed: int, width: int = 40, height: int = 30) -> Any:
    """Return a picture of random pixels."""
    from PIL import Image

    shape = (height, width, 3)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def chats_with_images(directory: Path, count: int) -> Path:
    """Write conversations about one or two pictures, with their paths; return the .jsonl file."""
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        names = []
        for which in range(1 + number % 2):
            name = f"pictures/{number}-{which}.png"
            picture(10 * number + which, 30 + number % 3 * 12, 30).save(directory / name)
            names.append(name)
        question, answer = (random_prose(8, seed=2 * number + half) for half in range(2))
        parts = [{"type": "image"} for _ in names] + [{"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        lines.append(json.dumps({"messages": messages, "images": names}))
    path = directory / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path
