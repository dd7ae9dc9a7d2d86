"""A tiny config for any decoder type of transformers: one table of names, one of exceptions.

`SMALL` says how large anything is, by the name that a config calls it; a config takes what it has
a field for. Each kind of block of a default config is there. `OVERRIDES` has what a type needs
besides, and `REPRESENTATIVES` the types that the contract and the stream are tested with.
"""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

BLOCKS, HIDDEN, WIDTH, EXPERT_WIDTH, EXPERTS, VOCABULARY = 3, 32, 96, 64, 4, 320


def _called(*rows: tuple[Any, str]) -> dict[str, Any]:
    """Return each value by all the names that configs call it."""
    return {name: value for value, names in rows for name in names.split()}


SMALL = _called(
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (256, "max_position_embeddings original_max_position_embeddings n_positions max_seq_len"),
    (HIDDEN, "hidden_size n_embd d_model"),
    (BLOCKS, "num_hidden_layers n_layer n_layers decoder_layers encoder_layers"),
    (4, "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads"),
    (2, "num_key_value_heads"),
    (16, "head_dim kv_channels"),
    # FFNs.
    (WIDTH, "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim"),
    (WIDTH, "n_inner ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
    (WIDTH, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (EXPERT_WIDTH, "moe_intermediate_size"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok top_k_experts moe_k"),
    (1, "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace"),
    # Attention with its own sizes.
    (24, "q_lora_rank"),
    (16, "kv_lora_rank qk_nope_head_dim v_head_dim query_pre_attn_scalar index_head_dim"),
    (8, "qk_rope_head_dim sliding_window attention_chunk_size index_topk"),
    (2, "index_n_heads"),
    # Linear attention and state spaces.
    (8, "linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_num_heads mamba_d_head"),
    (8, "mamba_head_dim mamba_d_state mamba_chunk_size ssm_state_size state_size chunk_size"),
    (8, "time_step_rank"),
    (2, "linear_num_key_heads n_groups"),
    (4, "linear_num_value_heads"),
    (16, "hidden_size_per_layer_input"),
    # Their own special tokens lie outside the tiny vocabulary.
    (0, "bos_token_id"),
    (1, "eos_token_id"),
    (None, "pad_token_id"),
    # Larger than the usual 0.02: a tiny model then computes something worth comparing.
    (0.2, "initializer_range init_std"),
)

SMALL_TOWER = _called(
    (32, "hidden_size embed_dim"),
    (64, "intermediate_size"),
    (2, "num_hidden_layers depth num_attention_heads num_key_value_heads num_heads"),
    (16, "head_dim num_position_embeddings position_embedding_size"),
    (HIDDEN, "out_hidden_size projection_dim output_proj_dims"),
    (28, "image_size"),
    (14, "patch_size"),
    ((1,), "fullatt_block_indexes"),
    ((0, 1), "deepstack_visual_indexes"),
    (0.2, "initializer_range"),
)

_SPECIAL_TOKENS = _called(
    (300, "image_token_id image_token_index"),
    (301, "video_token_id video_token_index"),
    (302, "audio_token_id"),
    (303, "boi_token_id boi_token_index"),
    (304, "eoi_token_id eoi_token_index"),
    (305, "boa_token_id"),
    (306, "eoa_token_id eoa_token_index"),
    (307, "vision_start_token_id image_start_token_id"),
    (308, "vision_end_token_id image_end_token_id"),
    (309, "video_start_token_id"),
    (310, "video_end_token_id"),
)

REPRESENTATIVES = (
    "llama", "qwen3", "gemma3", "gemma4", "gemma4_text", "qwen3_5", "qwen3_5_text", "qwen3_next",
    "gpt_oss", "deepseek_v3", "deepseek_v2", "glm4", "glm4_moe", "llama4", "llama4_text",
    "mistral3", "ministral3", "nemotron_h", "granitemoehybrid", "jamba", "lfm2", "falcon", "bloom",
    "mpt", "gpt2", "opt", "phi3", "mixtral", "olmoe", "olmo3", "cohere2", "qwen2_5_vl", "qwen3_vl",
    "llava_onevision", "internvl", "smolvlm", "paligemma", "glm4v",
)  # fmt: skip

_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
_LINEAR_THEN_FULL = ["linear_attention", "linear_attention", "full_attention"]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SMALL_MROPE = {**_MROPE, "mrope_section": [2, 1, 1]}
_PARTIAL_MROPE = {**_SMALL_MROPE, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
_INTERLEAVED_MROPE = {**_MROPE, "mrope_interleaved": True}
_TOWER = {"image_size": 28, "patch_size": 14}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER}
_SLIDING = {"layer_types": _SLIDING_THEN_FULL}
_LINEAR = {"layer_types": _LINEAR_THEN_FULL}
# Where no image is, the multimodal model looks at the embedding of the padding token.
_GEMMA4 = {**_SLIDING, "pad_token_id": 2}

# What a type needs besides `SMALL`: of its own config, and of the parts of a multimodal one.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "helium": {"head_dim": 8},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_dense_layers": 1},
    "emu3": {"text_config": {"pad_token_id": 2}},
    "bamba": {"attn_layer_indices": [1]},
    "cohere2": _SLIDING,
    "falcon": {"alibi": False},
    "gemma3": {
        "mm_tokens_per_image": 4, "text_config": _SLIDING,
        "vision_config": {**_SIGLIP, "image_size": 56},
    },
    "gemma3_text": _SLIDING,
    "gemma4": {"audio_config": None, "text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm46v": {"text_config": {"rope_parameters": _SMALL_MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {
        "text_config": {"rope_parameters": _SMALL_MROPE},
        "vision_config": {**_TOWER, "spatial_merge_size": 2},
    },
    "gpt_oss": _SLIDING,
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"]},
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama4": {
        "text_config": {"moe_layers": [1, 2], "num_experts_per_tok": 1},
        # Four patches become one token, of their width together.
        "vision_config": {
            **_TOWER, "intermediate_size": 128,
            **_called((32, "vision_output_dim projector_input_dim projector_output_dim")),
        },
    },
    "llama4_text": {"moe_layers": [1, 2], "num_experts_per_tok": 1},
    "llava_onevision": {
        "image_grid_pinpoints": [[28, 28]], "text_config": {"model_type": "qwen2"},
        "vision_config": _SIGLIP,
    },
    "longcat_flash": {
        "num_layers": 2, "head_dim": 8, "moe_topk": 2, "zero_expert_num": 2,
        "expert_ffn_hidden_size": EXPERT_WIDTH,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **_TOWER},
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"], "use_mamba_kernels": False,
    },
    "modernbert-decoder": {"pad_token_id": 2},
    "olmo3": _SLIDING,
    "paligemma": {
        "projection_dim": HIDDEN, "text_config": {"model_type": "gemma"}, "vision_config": _SIGLIP,
    },
    "phi3": {"num_key_value_heads": 4},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _SMALL_MROPE},
        "vision_config": {"patch_size": 14, "window_size": 56},
    },
    "qwen2_vl": {"text_config": {"rope_parameters": _SMALL_MROPE}},
    "qwen3_5": {"text_config": {**_LINEAR, "rope_parameters": _PARTIAL_MROPE}},
    "qwen3_5_text": {**_LINEAR, "rope_parameters": _PARTIAL_MROPE},
    "qwen3_next": _LINEAR,
    "qwen3_vl": {"text_config": {"rope_parameters": _INTERLEAVED_MROPE}},
    # Transposed or not is told by shapes: no width of experts may be the hidden size or half of it.
    "qwen3_vl_moe": {
        "text_config": {"hidden_size": 36, "rope_parameters": _INTERLEAVED_MROPE},
        "vision_config": {"out_hidden_size": 36},
    },
    "step3p7": {"text_config": {"pad_token_id": 2}},
    "smolvlm": {"text_config": {"model_type": "llama"}, "vision_config": _TOWER},
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a config of a type with a tiny decoder, and a tiny vision tower if it has one."""
    config_class = CONFIG_MAPPING[model_type]
    own = {**OVERRIDES.get(model_type, {}), **overrides}
    return config_class(**_values(config_class, SMALL, own))


def _values(
    config_class: type[PreTrainedConfig], sizes: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return what a config class is made with; its parts as dictionaries."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in {**sizes, **_SPECIAL_TOKENS}.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent: has no groups
    values |= overrides
    if sizes is SMALL and "layer_types" in fields and "layer_types" not in overrides:
        values |= _missing_kinds(config_class, values)
    for part in config_class.sub_configs:
        own = overrides.get(part, {})
        if own is None:
            continue
        part_class: Any = config_class.sub_configs[part]
        if part_class is AutoConfig:
            default = getattr(config_class(), part)
            part_class = CONFIG_MAPPING[own["model_type"]] if "model_type" in own else type(default)
        if not hasattr(part_class, "__dataclass_fields__"):
            continue
        is_tower = any(word in part for word in ("vision", "audio"))
        values[part] = _values(part_class, SMALL_TOWER if is_tower else SMALL, own)
        if "model_type" in fields:
            values[part].setdefault("model_type", part_class.model_type)
    return values


def _missing_kinds(
    config_class: type[PreTrainedConfig], values: dict[str, Any]
) -> dict[str, list[str]]:
    """Return kinds of blocks in which each kind of a default config is, if these values lack one.

    A rule such as one full attention every fourth block gives a tiny model none.
    """
    found, default = (config_class(**given).layer_types or [] for given in (values, {}))
    kinds = list(dict.fromkeys(default))
    if set(kinds) <= set(found) or not 1 < len(kinds) <= BLOCKS:
        return {}
    return {"layer_types": [*kinds[:1] * (BLOCKS - len(kinds)), *kinds]}


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Return the class of a type: multimodal if there is one, else a causal language model."""
    import transformers

    causal, multimodal = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    name = multimodal.get(model_type) or causal[model_type]
    found: type[PreTrainedModel] = getattr(
        transformers, name[0] if isinstance(name, tuple | list) else name
    )
    return found


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a model of a type with random weights, in float32, in evaluation mode."""
    return random_model(model_class(model_type), tiny_config(model_type, **overrides), seed)


def random_model(
    of_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """Return a model with random weights, in float32, in evaluation mode.

    What is made zero or one, such as norms and biases, would hide an error: it is random too.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = of_class._from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.02 * noise.to(parameter.dtype))
    return model
