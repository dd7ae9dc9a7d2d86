"""Which llama.cpp architecture runs a model, and what it reads; knowledge as data.

llama.cpp gives every block its own FFN width only in a few of its graphs. `deci` (Nemotron's)
is a Llama with per-block widths and optional biases; `openelm` is a tied Qwen3 with per-block
widths, once q, k and v are one matrix. With equal widths the ordinary architecture is used.

Rotary embedding: transformers turns element i together with i + half (as `qwen2`, `qwen3` and
`openelm` do); `llama` and `deci` turn neighbours, so rows of q and k must be reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError


@dataclass(frozen=True)
class Architecture:
    """What one llama.cpp graph expects.

    Attributes:
        name: general.architecture.
        ragged: it reads one FFN width a block.
        neighbours: its rotary embedding turns neighbouring elements.
        fused: q, k and v are one matrix.
        biases: it reads biases of attention.
        ffn_biases: it reads biases of the FFN.
        tied_only: it has no output matrix of its own.
        frequency_factors: it reads rope_freqs.weight.
    """

    name: str
    ragged: bool = False
    neighbours: bool = False
    fused: bool = False
    biases: bool = True
    ffn_biases: bool = False
    tied_only: bool = False
    frequency_factors: bool = False


_LLAMA = Architecture("llama", neighbours=True, frequency_factors=True, ffn_biases=True)
_DECI = Architecture("deci", ragged=True, neighbours=True, frequency_factors=True, ffn_biases=True)
_QWEN2 = Architecture("qwen2")
_QWEN3 = Architecture("qwen3", biases=False)
_OPENELM = Architecture("openelm", ragged=True, fused=True, biases=False, tied_only=True)

# model type -> (equal widths, different widths)
ARCHITECTURES: dict[str, tuple[Architecture, Architecture]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
}

_INSTEAD = "use --to padded and export that, or prune with --set block_metric=uniform"


def architecture_of(source: Checkpoint) -> Architecture:
    """Return the architecture that runs a checkpoint.

    Raises:
        ExportError: none does.
    """
    widths = source.architecture.widths
    found = ARCHITECTURES.get(source.config.model_type)
    if found is None:
        raise ExportError(
            f"gguf export of {source.config.model_type} models is not supported; supported are: "
            f"{', '.join(sorted(ARCHITECTURES))}; use --to padded, and llama.cpp's own converter"
        )
    architecture = found[len(set(widths)) > 1]
    _check_expressible(source, architecture)
    return architecture


def _check_expressible(source: Checkpoint, architecture: Architecture) -> None:
    config: Any = source.config
    name = architecture.name
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ExportError(f"llama.cpp's {name} graph has SiLU, the model {activation}")
    biased = sorted(tensor for tensor in source.specs if tensor.endswith(".bias"))
    if biased and not architecture.biases:
        raise ExportError(
            f"llama.cpp's {name} graph reads no biases, the model has {biased[0]}; "
            "use --to padded, and export that"
        )
    down = source.architecture.units[0].down.removesuffix("weight")
    down_bias = f"{source.architecture.block_prefix(0)}{down}bias"
    if down_bias in source.specs and not architecture.ffn_biases:
        raise ExportError(
            f"llama.cpp's {name} graph reads no FFN biases, the model has {down_bias}; "
            "use --to padded, and export that"
        )
    if architecture.tied_only and not config.tie_word_embeddings:
        raise ExportError(
            f"llama.cpp runs {source.config.model_type} blocks of different widths only through "
            f"its {name} graph, which has no output matrix of its own, and this model's is not "
            f"tied to the embeddings; {_INSTEAD}"
        )
    if architecture.fused and _qkv_specs_differ(source):
        raise ExportError(f"q, k and v are stored in different types; {_INSTEAD}")


def _qkv_specs_differ(source: Checkpoint) -> bool:
    prefix = source.architecture.block_prefix(0)
    return len({source.specs[f"{prefix}self_attn.{m}_proj.weight"].dtype for m in "qkv"}) > 1


def head_size(config: Any) -> int:
    """Return the number of elements of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
