"""Rotary position embedding in GGUF's terms: base, scaling, and per-frequency factors.

Shapes: R half the elements of a head, one for each frequency.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsp.errors import ExportError
from cfsp.exports.gguf_architecture import Architecture


@dataclass(frozen=True)
class Rope:
    """What a file says about positions.

    Attributes:
        fields: what to write, by the names of the writer's methods without `add_`.
        factors_R: by how much each frequency is divided; None for not at all.
    """

    fields: dict[str, Any]
    factors_R: NDArray[np.float32] | None = None


def rope_of(config: Any, architecture: Architecture) -> Rope:
    """Translate a config's rope parameters.

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
    base = float(parameters["rope_theta"])
    fields: dict[str, Any] = {"rope_freq_base": base}
    if kind == "default":
        return Rope(fields)
    if kind == "linear":
        factor = float(parameters["factor"])
        return Rope(
            fields | {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": factor}
        )
    if kind == "yarn":
        return Rope(fields | _yarn(parameters))
    if kind == "llama3":
        if not architecture.frequency_factors:
            raise ExportError(
                f"llama.cpp's {architecture.name} graph reads no factors for single frequencies, "
                "which llama3 scaling needs; use --to vllm or --to openvino"
            )
        return Rope(fields, _llama3_factors(config, base))
    raise ExportError(
        f"gguf export of rope scaling {kind!r} is not supported; supported are: "
        "default, linear, llama3, yarn"
    )


def _by_layer(config: Any, architecture: Architecture) -> Rope:
    """Return what a file says where blocks with a sliding window have positions of their own."""
    sliding = dict(config.rope_parameters["sliding_attention"])
    if sliding.get("rope_type", "default") != "default":
        raise ExportError("scaled positions in blocks with a sliding window are not supported")
    whole = copy(config)
    whole.rope_parameters = config.rope_parameters["full_attention"]
    rope = rope_of(whole, architecture)
    base, *scaling = rope.fields.items()
    base_swa = ("rope_freq_base_swa", float(sliding["rope_theta"]))
    return Rope(dict([base, base_swa, *scaling]), rope.factors_R)


def _yarn(parameters: dict[str, Any]) -> dict[str, Any]:
    from gguf import RopeScalingType

    if parameters.get("truncate") is False or parameters.get("mscale"):
        raise ExportError("llama.cpp has no YaRN without truncation or with mscale")
    factor = float(parameters["factor"])
    attention = parameters.get("attention_factor")
    if attention is not None:
        # llama.cpp multiplies by 0.1 ln(factor) + 1 (YaRN, arXiv 2309.00071, eq. 22) itself.
        attention = float(attention) / (0.1 * math.log(factor) + 1.0)
    fields = {
        "rope_scaling_type": RopeScalingType.YARN,
        "rope_scaling_factor": factor,
        "rope_scaling_orig_ctx_len": int(parameters["original_max_position_embeddings"]),
        "rope_scaling_attn_factors": attention,
        "rope_scaling_yarn_beta_fast": parameters.get("beta_fast"),
        "rope_scaling_yarn_beta_slow": parameters.get("beta_slow"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _llama3_factors(config: Any, base: float) -> NDArray[np.float32]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_R, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    count = len(scaled_R)
    plain_R = base ** (-np.arange(count, dtype=np.float64) / count)
    factors_R: NDArray[np.float32] = (plain_R / scaled_R.double().numpy()).astype(np.float32)
    return factors_R
