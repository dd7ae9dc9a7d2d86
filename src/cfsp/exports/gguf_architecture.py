"""Which llama.cpp architecture runs a model, and what it reads; knowledge as data.

llama.cpp gives every block its own FFN width only in a few of its graphs. `deci` (Nemotron's)
is a Llama with per-block widths and optional biases; `openelm` is a tied Qwen3 with per-block
widths, once q, k and v are one matrix. With equal widths the ordinary architecture is used.

Rotary embedding: transformers turns element i together with i + half (as `qwen2`, `qwen3`,
`openelm` and `gemma2` do); `llama` and `deci` turn neighbours, so rows of q and k must be
reordered.

Gemma 2 and 3 have graphs for one width only, with sliding windows in a fixed rhythm.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.checkpoint.config_widths import resized_parts
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.context import head_size, heads_of_blocks
from cfsp.settings import Budget

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """What one llama.cpp graph expects.

    Attributes:
        name: general.architecture.
        ragged: it reads one FFN width a block.
        is_llama: its rotary embedding turns neighbouring elements, and it reads biases of the FFN
            and rope_freqs.weight.
        biases: it reads biases of attention.
        rhythm: of Gemma's, whose norms are sums with one: every so many blocks one attends to all
            tokens, the others to a sliding window. 0 where no block has one.
    """

    name: str
    ragged: bool = False
    is_llama: bool = False
    biases: bool = False
    rhythm: int = 0

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return self.name == "openelm"

    @property
    def tied_only(self) -> bool:
        """Whether it has no output matrix of its own."""
        return self.fused or bool(self.rhythm)

    @property
    def activation(self) -> str:
        """Of the FFN, by transformers' name."""
        return "gelu_pytorch_tanh" if self.rhythm else "silu"


_LLAMA = Architecture("llama", is_llama=True, biases=True)
_DECI = Architecture("deci", ragged=True, is_llama=True, biases=True)
_GEMMA2 = Architecture("gemma2", rhythm=2)
_GEMMA3 = Architecture("gemma3", rhythm=6)

_SCALED_BY_HIDDEN = (46, 62)

# model type -> (equal widths, different widths)
ARCHITECTURES: dict[str, tuple[Architecture, Architecture | None]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (Architecture("qwen2", biases=True), _DECI),
    "qwen3": (Architecture("qwen3"), Architecture("openelm", ragged=True)),
    "gemma2": (_GEMMA2, None),
    "gemma3_text": (_GEMMA3, None),
}

_INSTEAD = "prune with --widths equal"


def architecture_of(source: Checkpoint) -> Architecture:
    """Return the architecture that runs a checkpoint.

    Raises:
        ExportError: none does.
    """
    widths = source.architecture.of_part("ffn").widths
    found = ARCHITECTURES.get(source.config.model_type)
    if found is None:
        instead = (
            f"{_INSTEAD}, and run llama.cpp's own converter on that"
            if resized_parts(source.config)
            else "this checkpoint is a stock one: run llama.cpp's own converter on it"
        )
        raise ExportError(
            f"gguf export of {source.config.model_type} models is not supported; supported are: "
            f"{', '.join(sorted(ARCHITECTURES))}; {instead}"
        )
    differ = len(set(widths)) > 1 or len(set(heads_of_blocks(source))) > 1
    architecture = found[differ]
    if architecture is None:
        raise ExportError(
            f"llama.cpp's {found[0].name} graph has one width for all blocks, and this model's "
            f"differ; {_INSTEAD}"
        )
    if source.architecture.gone and architecture is not _DECI:
        raise ExportError(
            f"llama.cpp runs blocks without attention only through its {_DECI.name} graph, and "
            f"this {source.config.model_type} model needs {architecture.name}; prune it without "
            "--parts attention"
        )
    _check_expressible(source, architecture)
    return architecture


def warn_of_no_way_back(source: Checkpoint, budget: Budget) -> None:
    """Warn where a model from a .gguf file cannot become one again once it is pruned like this."""
    if Path(source.label).suffix != ".gguf" or "ffn" not in budget.parts:
        return
    _, ragged = ARCHITECTURES.get(source.config.model_type, (None, None))
    has_head = not source.config.tie_word_embeddings
    if budget.widths != "equal" and (ragged is None or (ragged.tied_only and has_head)):
        _logger.warning(
            "%s: llama.cpp runs blocks of different widths of no %s model%s, so what is pruned "
            "cannot go back into a .gguf file; prune with --widths equal if it shall",
            Path(source.label).name,
            source.config.model_type,
            " with an output matrix of its own" if ragged else "",
        )


def _check_expressible(source: Checkpoint, architecture: Architecture) -> None:
    config: Any = source.config
    name = architecture.name
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if activation != architecture.activation:
        raise ExportError(
            f"llama.cpp's {name} graph has {architecture.activation}, the model {activation}"
        )
    biased = sorted(tensor for tensor in source.specs if tensor.endswith(".bias"))
    if biased and not architecture.biases:
        raise ExportError(
            f"llama.cpp's {name} graph reads no biases, the model has {biased[0]}; "
            "use --to openvino"
        )
    down = source.architecture.of_part("ffn").units[0].down.removesuffix("weight")
    down_bias = f"{source.architecture.block_prefix(0)}{down}bias"
    if down_bias in source.specs and not architecture.is_llama:
        raise ExportError(
            f"llama.cpp's {name} graph reads no FFN biases, the model has {down_bias}; "
            "use --to openvino"
        )
    if architecture.tied_only and not config.tie_word_embeddings:
        if not architecture.ragged:
            raise ExportError(f"llama.cpp's {name} graph has no output matrix of its own")
        raise ExportError(
            f"llama.cpp runs {source.config.model_type} blocks of different widths only through "
            f"its {name} graph, which has no output matrix of its own, and this model's is not "
            f"tied to the embeddings; {_INSTEAD}"
        )
    if architecture.rhythm:
        _check_is_gemma(config, architecture)
    if architecture.fused and _qkv_specs_differ(source):
        raise ExportError(f"q, k and v are stored in different types; {_INSTEAD}")


def _check_is_gemma(config: Any, architecture: Architecture) -> None:
    """Check what these graphs take for granted."""
    name, size = architecture.name, head_size(config)
    # With as many blocks as the 27B models have, the graph scales by the width of a head in D.
    if config.query_pre_attn_scalar != size or config.num_hidden_layers in _SCALED_BY_HIDDEN:
        raise ExportError(f"llama.cpp's {name} graph scales the attention of this model otherwise")
    expected = [
        "full_attention" if block % architecture.rhythm == 0 else "sliding_attention"
        for block in range(1, config.num_hidden_layers + 1)
    ]
    if config.layer_types != expected:
        raise ExportError(
            f"llama.cpp's {name} graph attends to all tokens in every block whose number is a "
            f"multiple of {architecture.rhythm}, the model in others"
        )
    if architecture is _GEMMA2 and not (
        config.attn_logit_softcapping and config.final_logit_softcapping
    ):
        raise ExportError(f"llama.cpp's {name} graph caps logits, the model does not")
    if architecture is _GEMMA3 and (
        config.attn_logit_softcapping or config.final_logit_softcapping
    ):
        raise ExportError(f"llama.cpp's {name} graph caps no logits, the model does")


def _qkv_specs_differ(source: Checkpoint) -> bool:
    prefix = source.architecture.block_prefix(0)
    return len({source.specs[f"{prefix}self_attn.{m}_proj.weight"].dtype for m in "qkv"}) > 1
