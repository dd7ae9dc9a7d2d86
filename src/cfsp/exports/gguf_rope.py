"""Rotary position embedding in GGUF's terms: base, scaling, and per-frequency factors.

Shapes: R half the elements of a head, one for each frequency.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsp.errors import ExportError
from cfsp.exports.gguf_architecture import Architecture


def rope_of(config: Any, architecture: Architecture) -> tuple[dict[str, Any], Tensor | None]:
    """Translate a config's rope parameters.

    Returns:
        The file's fields, by the names of the writer's methods without `add_`, and factors_R by
        which each frequency is divided, in float32; None for not at all.

    Raises:
        ExportError: llama.cpp has nothing that computes the same.
    """
    from gguf import RopeScalingType

    parameters = dict(config.rope_parameters)
    if architecture.rhythm and "full_attention" in parameters:
        return _by_layer(config, architecture)
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("rotary embeddings of a part of the head or by layer are not supported")
    fields: dict[str, Any] = {"rope_freq_base": float(parameters["rope_theta"])}
    if kind in ("linear", "yarn"):
        fields["rope_scaling_type"] = RopeScalingType[kind.upper()]
        fields["rope_scaling_factor"] = float(parameters["factor"])
    if kind == "yarn":
        fields |= _yarn(parameters)
    if kind == "llama3":
        if not architecture.is_llama:
            raise ExportError(
                f"llama.cpp's {architecture.name} graph reads no factors for single frequencies, "
                "which llama3 scaling needs; use --to vllm or --to openvino"
            )
        return fields, _llama3_factors(config, fields["rope_freq_base"])
    if kind not in ("default", "linear", "yarn"):
        raise ExportError(
            f"gguf export of rope scaling {kind!r} is not supported; supported are: "
            "default, linear, llama3, yarn"
        )
    return fields, None


def _by_layer(config: Any, architecture: Architecture) -> tuple[dict[str, Any], Tensor | None]:
    """Return what a file says where blocks with a sliding window have positions of their own."""
    sliding = dict(config.rope_parameters["sliding_attention"])
    if sliding.get("rope_type", "default") != "default":
        raise ExportError("scaled positions in blocks with a sliding window are not supported")
    whole = copy(config)
    whole.rope_parameters = config.rope_parameters["full_attention"]
    fields, factors_R = rope_of(whole, architecture)
    base, *scaling = fields.items()
    base_swa = ("rope_freq_base_swa", float(sliding["rope_theta"]))
    return dict([base, base_swa, *scaling]), factors_R


def _yarn(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters.get("truncate") is False or parameters.get("mscale"):
        raise ExportError("llama.cpp has no YaRN without truncation or with mscale")
    attention = parameters.get("attention_factor")
    if attention is not None:
        # llama.cpp multiplies by 0.1 ln(factor) + 1 (YaRN, arXiv 2309.00071, eq. 22) itself.
        attention = float(attention) / (0.1 * math.log(float(parameters["factor"])) + 1.0)
    return {
        "rope_scaling_orig_ctx_len": int(parameters["original_max_position_embeddings"]),
        "rope_scaling_attn_factors": attention,
        "rope_scaling_yarn_beta_fast": parameters.get("beta_fast"),
        "rope_scaling_yarn_beta_slow": parameters.get("beta_slow"),
    }


def _llama3_factors(config: Any, base: float) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_R, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain_R = base ** (-np.arange(len(scaled_R), dtype=np.float64) / len(scaled_R))
    return torch.from_numpy(plain_R / scaled_R.double().numpy()).float()
