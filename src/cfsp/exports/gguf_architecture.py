"""Which llama.cpp architecture runs a model, and what it reads; knowledge as data.

llama.cpp gives every block its own FFN width only in a few of its graphs. `deci` (Nemotron's)
is a Llama with per-block widths and optional biases; `openelm` is a tied Qwen3 with per-block
widths, once q, k and v are one matrix. Gemma 2 and 3 have graphs for one width only, with sliding
windows in a fixed rhythm. With equal widths the ordinary architecture is used.

transformers' rotary embedding turns element i together with i + half (as `qwen2`, `qwen3`,
`openelm` and `gemma2` do); `llama` and `deci` turn neighbours: rows of q and k are reordered.

Shapes: R half the elements of a head, one for each frequency.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cfsp.checkpoint.gguf_rope import llama3_factors, query_scalar, yarn_attention
from cfsp.checkpoint.locating import is_gguf_file
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import resized_parts
from cfsp.checkpoint.text_config import head_size
from cfsp.errors import CannotSayError
from cfsp.exports.common import heads_of_blocks
from cfsp.settings import Budget

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """What one llama.cpp graph expects."""

    name: str  # general.architecture
    ragged: bool = False  # it reads one FFN width a block
    # Its rotary embedding turns neighbouring elements; it reads FFN biases and rope_freqs.weight.
    is_llama: bool = False
    biases: bool = False  # it reads biases of attention
    fused: bool = False  # q, k and v are one matrix
    tied_only: bool = False  # it has no output matrix of its own
    # Of Gemma's, whose norms are sums with one: every so many blocks one attends to all tokens, the
    # others to a sliding window. 0 where no block has one.
    rhythm: int = 0
    activation: str = "silu"  # of the FFN, by transformers' name


_LLAMA = Architecture("llama", is_llama=True, biases=True)
_DECI = Architecture("deci", ragged=True, is_llama=True, biases=True)
_OPENELM = Architecture("openelm", ragged=True, fused=True, tied_only=True)
_GEMMA2 = Architecture("gemma2", tied_only=True, rhythm=2, activation="gelu_pytorch_tanh")
_GEMMA3 = replace(_GEMMA2, name="gemma3", rhythm=6)

# model type -> (equal widths, different widths)
ARCHITECTURES: dict[str, tuple[Architecture, Architecture | None]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (Architecture("qwen2", biases=True), _DECI),
    "qwen3": (Architecture("qwen3"), _OPENELM),
    "gemma2": (_GEMMA2, None),
    "gemma3_text": (_GEMMA3, None),
}

_BETAS = {"beta_fast": 32, "beta_slow": 1}  # of YaRN; the graphs read none from a file
_INSTEAD = "prune with --widths equal"


def architecture_of(source: Checkpoint) -> Architecture:
    """Return the architecture that runs a checkpoint, or raise CannotSayError."""
    architecture = _graph_for(source.config)
    config: Any = source.config
    widths = source.architecture.of_part("ffn").widths
    # Heads that are together as wide as the hidden state, this graph takes for granted.
    queries = head_size(config) * config.num_attention_heads
    no_qwen2 = architecture.name == "qwen2" and queries != config.hidden_size
    if no_qwen2 or len(set(widths)) > 1 or len(set(heads_of_blocks(source))) > 1:
        gone = bool(source.architecture.gone)
        architecture = _graph_for(source.config, differ=True, gone=gone)
    for obstacle in _obstacles(source, architecture):
        raise CannotSayError(obstacle)
    return architecture


def check(source: Checkpoint) -> None:
    """Check that llama.cpp can run a checkpoint."""
    rope_of(source.config, architecture_of(source))


def _graph_for(config: Any, *, differ: bool = False, gone: bool = False) -> Architecture:
    """Return the graph for blocks that are alike, differ, or lack attention, or raise an error."""
    if config.model_type not in ARCHITECTURES:
        raise CannotSayError(
            f"gguf export of {config.model_type} models is not supported; supported are: "
            f"{', '.join(sorted(ARCHITECTURES))}",
            f"{_INSTEAD} and run llama.cpp's own converter on the stock checkpoint"
            if resized_parts(config)
            else "run llama.cpp's own converter on it",
        )
    alike, ragged = ARCHITECTURES[config.model_type]
    if not differ:
        return alike
    if ragged is None or (ragged.tied_only and not config.tie_word_embeddings):
        which = " whose output matrix is not tied to the embeddings" if ragged else ""
        raise CannotSayError(
            f"llama.cpp runs no {config.model_type} model{which} with blocks of different widths "
            "or heads",
            f"{_INSTEAD} and without --parts attention" if gone else _INSTEAD,
        )
    if gone and ragged is not _DECI:
        raise CannotSayError(
            f"llama.cpp runs blocks without attention only through its {_DECI.name} graph, and "
            f"this {config.model_type} model needs {ragged.name}",
            "prune it without --parts attention",
        )
    return ragged


def warn_of_no_way_back(source: Checkpoint, budget: Budget) -> None:
    """Warn where a model from a .gguf file cannot become one again once it is pruned like this."""
    path, gone = Path(source.label), "attention" in budget.parts
    alike = budget.widths == "equal" and not budget.keep
    differ = gone or (bool(budget.channel_parts) and not alike)
    if is_gguf_file(path) and differ:
        try:
            _graph_for(source.config, differ=True, gone=gone)
        except CannotSayError as error:
            _logger.warning("%s becomes no .gguf file again if blocks differ: %s", path.name, error)


def _obstacles(source: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """Yield what the graph of an architecture cannot express of a model."""
    config: Any = source.config
    graph = f"llama.cpp's {architecture.name} graph"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if activation != architecture.activation:
        yield f"{graph} has {architecture.activation}, the model {activation}"
    biased = sorted(tensor for tensor in source.specs if tensor.endswith(".bias"))
    if biased and not architecture.biases:
        yield f"{graph} reads no biases, the model has {biased[0]}"
    if architecture.tied_only and not config.tie_word_embeddings:
        yield f"{graph} has no output matrix of its own"
    if architecture.rhythm:
        yield from _obstacles_of_gemma(config, architecture, graph)


def _obstacles_of_gemma(config: Any, architecture: Architecture, graph: str) -> Iterator[str]:
    """Yield what is not as these graphs take it for granted."""
    blocks = config.num_hidden_layers
    if config.query_pre_attn_scalar != query_scalar(architecture.name, config):
        yield f"{graph} scales the attention of this model otherwise"
    expected = [
        "full_attention" if block % architecture.rhythm == 0 else "sliding_attention"
        for block in range(1, blocks + 1)
    ]
    if config.layer_types != expected:
        yield (
            f"{graph} attends to all tokens in every block whose number is a multiple of "
            f"{architecture.rhythm}, the model in others"
        )
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if architecture is _GEMMA2 and not all(caps):
        yield f"{graph} caps logits, the model does not"
    if architecture is _GEMMA3 and any(caps):
        yield f"{graph} caps no logits, the model does"


def rope_of(config: Any, architecture: Architecture) -> tuple[dict[str, Any], Tensor | None]:
    """Translate a config's rope parameters into fields, by the writer's methods without `add_`.

    Second come factors_R by which each frequency is divided, in float32; None for not at all.
    """
    parameters = dict(config.rope_parameters)
    if architecture.rhythm and "full_attention" in parameters:
        return _by_layer(config, architecture)
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CannotSayError("llama.cpp has no rotary embeddings of a part of the head or by layer")
    fields: dict[str, Any] = {"rope_freq_base": float(parameters["rope_theta"])}
    if kind in ("linear", "yarn"):
        fields["rope_scaling_type"] = kind
        fields["rope_scaling_factor"] = float(parameters["factor"])
    if kind == "yarn":
        fields |= _yarn(parameters)
    if kind == "llama3":
        if not architecture.is_llama:
            raise CannotSayError(
                f"llama.cpp's {architecture.name} graph reads no factors for single frequencies, "
                "which llama3 scaling needs"
            )
        return fields, llama3_factors(config, fields["rope_freq_base"])
    if kind not in ("default", "linear", "yarn"):
        raise CannotSayError(
            f"gguf export of rope scaling {kind!r} is not supported; supported are: "
            "default, linear, llama3, yarn"
        )
    return fields, None


def _by_layer(config: Any, architecture: Architecture) -> tuple[dict[str, Any], Tensor | None]:
    """Return what a file says where blocks with a sliding window have positions of their own."""
    sliding = dict(config.rope_parameters["sliding_attention"])
    if sliding.get("rope_type", "default") != "default":
        raise CannotSayError("scaled positions in blocks with a sliding window are not supported")
    whole = copy(config)
    whole.rope_parameters = config.rope_parameters["full_attention"]
    fields, factors_R = rope_of(whole, architecture)
    base, *scaling = fields.items()
    base_swa = ("rope_freq_base_swa", float(sliding["rope_theta"]))
    return dict([base, base_swa, *scaling]), factors_R


def _yarn(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters.get("truncate") is False or parameters.get("mscale"):
        raise CannotSayError("llama.cpp has no YaRN without truncation or with mscale")
    for name, usual in _BETAS.items():
        if (found := parameters.get(name) or usual) != usual:
            raise CannotSayError(f"llama.cpp's YaRN has {name} {usual}, the model {found}")
    attention = parameters.get("attention_factor")
    if attention is not None:
        # llama.cpp multiplies by this itself.
        attention = float(attention) / yarn_attention(float(parameters["factor"]))
    return {
        "rope_scaling_orig_ctx_len": int(parameters["original_max_position_embeddings"]),
        "rope_scaling_attn_factors": attention,
    }
