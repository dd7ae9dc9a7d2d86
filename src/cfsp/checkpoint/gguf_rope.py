"""What attention computes with, besides weights, of which transformers reads the base alone.

A file says a base, how many entries of a head are rotated, a way to scale (`linear`, `yarn`), or by
what each frequency is divided, which is how Llama 3.1 and the long Phi 3 are written; how long a
window is, and which blocks have one; and how Gemma 2 caps its logits. How Gemma's queries are
scaled llama.cpp knows by itself. R rotated pairs of entries.
"""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cfsp.checkpoint.text_config import head_size, longest_input_of, text_config_of

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig

# Llama 3.1's; `original` is tried besides.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ORIGINAL = (8192, *(2**power for power in range(4, 18)))
_SAME = 1e-3  # of factors that are stored in float32
# By what a config calls them: of some graphs transformers reads them, of others it does not.
_CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
_SIZES = {
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_positions": "context_length",
}
_EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
# Of so many blocks are the 27B models, by the graph that runs them.
_BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}


def query_scalar(graph: str, config: Any) -> int:
    """Return by whose root llama.cpp divides the queries of Gemma 2 and 3; no file says it."""
    if config.num_hidden_layers == _BLOCKS_OF_27B.get(graph):
        return int(config.hidden_size // config.num_attention_heads)
    return head_size(config)


def restore_numbers(config: PreTrainedConfig, reader: GGUFReader) -> None:
    """Write the numbers of a file, and how queries are scaled, into the config read from it."""
    graph, text_config = reader.fields["general.architecture"].contents(), text_config_of(config)
    # Of Gemma 4, whose blocks differ, the sizes are not one number.
    differ = getattr(text_config, "is_heterogeneous", False)
    numbers = _CAPS if differ else _CAPS | _SIZES
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if f"{graph}.{key}" in reader.fields:
            numbers = numbers | dict.fromkeys(_EPSILONS, key)
    for name, key in numbers.items():
        said = reader.fields.get(f"{graph}.{key}")
        if said is not None and hasattr(text_config, name):
            setattr(text_config, name, said.contents() or None)  # 0: no window
    pattern = reader.fields.get(f"{graph}.attention.sliding_window_pattern")
    types = getattr(text_config, "layer_types", None) or []
    if pattern is not None and "sliding_attention" in types:
        text_config.layer_types = _layer_types(pattern.contents(), len(types))
        if differ and text_config.layer_types != types:  # by which it has given blocks their sizes
            raise ValueError("other blocks have a window than in the model's class")
    if hasattr(text_config, "query_pre_attn_scalar"):
        text_config.query_pre_attn_scalar = query_scalar(graph, text_config)


def restore_positions(config: PreTrainedConfig, reader: GGUFReader) -> None:
    """Write what a file says of positions into the config that was read from it.

    A ValueError says what no config of these can say.
    """
    text_config = text_config_of(config)
    parameters = getattr(text_config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    # Where blocks with a sliding window have positions of their own, all else is of the others.
    whole = parameters.get("full_attention", parameters)
    said = {"scaling.original_context_length": longest_input_of(config), **_said(reader)}
    tensors = {each.name: each for each in reader.tensors}
    if "freq_base" in said:
        whole["rope_theta"] = float(said["freq_base"])
    elif reader.fields["general.architecture"].contents() == "gemma3":
        # Nor do such files say that positions are scaled: Ollama's runtime knows it.
        raise ValueError("it says no base of its positions, as Ollama's own files of Gemma 3")
    if "freq_base_swa" in said and "sliding_attention" in parameters:
        parameters["sliding_attention"]["rope_theta"] = float(said["freq_base_swa"])
    if "partial_rotary_factor" in whole and "dimension_count" in said:
        whole["partial_rotary_factor"] = said["dimension_count"] / head_size(text_config)
    if whole.get("rope_type", "default") != "default":
        return  # transformers has read it, as that of gpt-oss
    is_long = "rope_factors_long.weight" in tensors
    factor = said.get("scaling.factor", said.get("scale_linear"))  # so before there were types
    kind = said.get("scaling.type", "none" if factor is None else "linear")
    if kind in ("linear", "yarn"):
        whole |= {"rope_type": kind, "factor": float(factor or 1.0)}
    elif kind != "none" and not is_long:
        raise ValueError(f"its positions are scaled by {kind}")
    if kind == "yarn":
        whole |= _yarn(whole["factor"], said)
    elif not is_long and said.get("scaling.attn_factor", 1.0) != 1.0:
        raise ValueError("its attention is scaled, which a config can say of YaRN and LongRoPE")
    if is_long:
        whole |= _longrope(tensors, said)
        if hasattr(text_config, "original_max_position_embeddings"):
            text_config.original_max_position_embeddings = whole["original_max_position_embeddings"]
    if "rope_freqs.weight" in tensors:
        factors_R = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)).float()
        if bool((factors_R != 1).any()):
            whole |= _llama3(text_config, whole, factors_R)


def llama3_factors(config: Any, base: float) -> Tensor:
    """Return by what Llama 3.1's scaling divides each frequency, R, in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_R, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain_R = base ** (-np.arange(len(scaled_R), dtype=np.float64) / len(scaled_R))
    return torch.from_numpy(plain_R / scaled_R.double().numpy()).float()


def yarn_attention(factor: float) -> float:
    """Return what llama.cpp multiplies YaRN's attention by (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0


def _said(reader: GGUFReader) -> dict[str, Any]:
    """Return what the file says of positions; `_swa` is of blocks with a sliding window."""
    prefix = f"{reader.fields['general.architecture'].contents()}.rope."
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }


def _layer_types(pattern: Any, blocks: int) -> list[str]:
    """Return the types of blocks: a list says which have a window; n, that each nth has none."""
    if type(pattern) is int and pattern >= 0:  # 0: all have one
        pattern = [not pattern or block % pattern < pattern - 1 for block in range(blocks)]
    if not isinstance(pattern, list) or len(pattern) != blocks or not set(pattern) <= {0, 1}:
        raise ValueError(f"its sliding_window_pattern is no number and not one of {blocks} blocks")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _yarn(factor: float, said: dict[str, Any]) -> dict[str, Any]:
    original = said["scaling.original_context_length"]
    found: dict[str, Any] = {"original_max_position_embeddings": int(original)}
    if "scaling.attn_factor" in said:
        found["attention_factor"] = float(said["scaling.attn_factor"]) * yarn_attention(factor)
    if "scaling.yarn_attn_factor" in said:  # a config's own, which llama.cpp does not apply
        found["attention_factor"] = float(said["scaling.yarn_attn_factor"])
    betas = {name: said.get(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return found | {name: float(value) for name, value in betas.items() if value is not None}


def _longrope(tensors: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of positions with factors for long and for short texts."""
    found: dict[str, Any] = {
        f"{length}_factor": tensors[f"rope_factors_{length}.weight"].data.tolist()
        for length in ("long", "short")
    }
    if "scaling.attn_factor" in said:
        found["attention_factor"] = float(said["scaling.attn_factor"])
    original = int(said["scaling.original_context_length"])
    return found | {"rope_type": "longrope", "original_max_position_embeddings": original}


def _llama3(config: Any, plain: dict[str, Any], factors_R: Tensor) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling that give the factors of a file."""
    for original in _LLAMA3_ORIGINAL:
        found = {"rope_type": "llama3", "factor": float(factors_R.max()), **_LLAMA3}
        found["original_max_position_embeddings"] = original
        tried = copy(config)
        tried.rope_parameters = plain | found
        own_R = llama3_factors(tried, plain["rope_theta"])
        if own_R.shape == factors_R.shape and torch.allclose(own_R, factors_R, rtol=_SAME):
            return found
    raise ValueError("its positions have factors for single frequencies that are not Llama 3.1's")
