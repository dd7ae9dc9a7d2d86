"""The model types that the contract and the engine are tested with, by name."""

from __future__ import annotations

REPRESENTATIVES = (
    "llama", "qwen3", "gemma3", "gemma4", "gemma4_text", "qwen3_5", "qwen3_5_text", "qwen3_next",
    "gpt_oss", "deepseek_v3", "deepseek_v2", "glm4", "glm4_moe", "llama4", "llama4_text",
    "mistral3", "ministral3", "nemotron_h", "granitemoehybrid", "jamba", "lfm2", "falcon", "bloom",
    "mpt", "gpt2", "opt", "phi3", "mixtral", "olmoe", "olmo3", "cohere2", "qwen2_5_vl", "qwen3_vl",
    "llava_onevision", "internvl", "smolvlm", "paligemma", "glm4v",
)  # fmt: skip
