"""What the readers of DeciLM's layout read of it, and what they cannot.

All of them know blocks of different widths as `ffn_mult`, a multiple of the hidden size that they
round up to 256 channels. Only vLLM also reads a width as it is. All of them know blocks without
attention (`no_op`) and how many query heads share a head of keys and values (`n_heads_in_group`),
but take the number of query heads from the config of the whole model. So a block whose attention
has lost KV groups, with their query heads, cannot be said.
"""

from __future__ import annotations

from dataclasses import dataclass

# Every reader rounds a width that is given as `ffn_mult` up to a multiple of this.
ROUNDING = 256


@dataclass(frozen=True)
class DeciLMModel:
    """What decides whether a reader can run a model.

    Attributes:
        widths: channels of every block's FFN.
        groups: KV groups of every block's attention; 0 where it is gone.
        activation: the config's name of it.
        attention_bias: whether any projection of the attention has a bias.
        mlp_bias: whether the FFN has biases.
        sliding_window: whether some block sees no further than a window.
        own_head_width: whether the heads together are not as wide as the hidden state.
        rope_type: the config's name of how positions are scaled.
    """

    widths: tuple[int, ...]
    groups: tuple[int, ...]
    activation: str
    attention_bias: bool
    mlp_bias: bool
    sliding_window: bool
    own_head_width: bool
    rope_type: str


@dataclass(frozen=True)
class Reader:
    """Software that reads DeciLM's layout.

    Attributes:
        target: its name on the command line.
        name: its own.
        serve: the command that serves a directory `{out}`.
        trust: what the command needs besides, where a class of config lies in the directory.
        any_width: whether it reads widths that are no multiples of 256.
        any_activation: whether it has others than `silu`.
        attention_bias: whether it has biases in the attention.
        mlp_bias: whether it has biases in the FFN.
        sliding_window: whether it has sliding windows.
        own_head_width: whether heads can be of any width.
        first_without_attention: whether the first block may have no attention.
        rope_types: which ways to scale positions it has; None for those of transformers.
        old_rope_words: whether it looks for `rope_theta` and `rope_scaling` in the config, as
            transformers did before version 5.
    """

    target: str
    name: str
    serve: str
    trust: str
    any_width: bool
    any_activation: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: bool
    own_head_width: bool
    first_without_attention: bool
    rope_types: tuple[str, ...] | None
    old_rope_words: bool


VLLM = Reader(
    "vllm",
    "vLLM",
    "vllm serve {out}",
    "--trust-remote-code",
    any_width=True,
    any_activation=True,
    attention_bias=True,
    mlp_bias=True,
    sliding_window=True,
    own_head_width=True,
    first_without_attention=False,
    rope_types=None,
    old_rope_words=False,
)
SGLANG = Reader(
    "sglang",
    "SGLang",
    "python -m sglang.launch_server --model-path {out}",
    "--trust-remote-code",
    any_width=False,
    any_activation=False,
    attention_bias=True,
    mlp_bias=False,
    sliding_window=False,
    own_head_width=True,
    first_without_attention=False,
    rope_types=None,
    old_rope_words=False,
)
TENSORRT_LLM = Reader(
    "tensorrt-llm",
    "TensorRT-LLM",
    "trtllm-serve {out}",
    "--trust_remote_code",
    any_width=False,
    any_activation=False,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=False,
    own_head_width=True,
    first_without_attention=True,
    rope_types=None,
    old_rope_words=True,
)
MLX_LM = Reader(
    "mlx-lm",
    "mlx-lm",
    "mlx_lm.server --model {out}",
    "",
    any_width=False,
    any_activation=False,
    attention_bias=True,
    mlp_bias=True,
    sliding_window=False,
    own_head_width=False,
    first_without_attention=True,
    rope_types=("default", "linear", "llama3", "yarn"),
    old_rope_words=True,
)
READERS = (VLLM, SGLANG, TENSORRT_LLM, MLX_LM)


def has_multiples(widths: tuple[int, ...]) -> bool:
    """Return whether all widths can be given as `ffn_mult`."""
    return all(width % ROUNDING == 0 for width in widths)


def ffn_mult(width: int, hidden: int) -> float:
    """Return the multiple of the hidden size that readers turn into exactly this width.

    They take two thirds of it, cut the fraction off and round up to 256. Aiming at the middle
    of the last 256 channels leaves room for six decimals, which is what mlx-lm keeps.

    Args:
        width: a multiple of 256.
        hidden: size of the hidden state.
    """
    return round(3 * (width - ROUNDING // 2) / (2 * hidden), 6)


def width_of(ffn_mult: float, hidden: int) -> int:
    """Return the width that readers make of `ffn_mult`."""
    return -(-int(2 * ffn_mult * hidden / 3) // ROUNDING) * ROUNDING


def obstacle(reader: Reader, model: DeciLMModel) -> str | None:
    """Return why a reader cannot run a model, as the end of a sentence; None if it can."""
    odd = [block for block, width in enumerate(model.widths) if width % ROUNDING]
    of_attentions = sorted({groups for groups in model.groups if groups})
    has_rope = reader.rope_types is None or model.rope_type in reader.rope_types
    obstacles = (
        (
            bool(odd) and not reader.any_width,
            f"widths that are multiples of {ROUNDING} only, and {len(odd)} of "
            f"{len(model.widths)} blocks have others; prune with --set multiple={ROUNDING}",
        ),
        (
            len(of_attentions) > 1,
            "one number of heads for all attentions (n_heads_in_group says only how many of them "
            f"share keys and values), and the model's have {of_attentions[0]} to "
            f"{of_attentions[-1]} KV groups",
        ),
        (
            model.groups[0] == 0 and not reader.first_without_attention,
            "an attention in the first block, and the model has none there",
        ),
        (
            model.activation != "silu" and not reader.any_activation,
            f"the activation silu only, and the model has {model.activation}",
        ),
        (
            model.attention_bias and not reader.attention_bias,
            "no biases in the attention, and the model has them",
        ),
        (model.mlp_bias and not reader.mlp_bias, "no biases in the FFN, and the model has them"),
        (
            model.sliding_window and not reader.sliding_window,
            "no sliding window, and the model has one",
        ),
        (
            model.own_head_width and not reader.own_head_width,
            "heads that are together as wide as the hidden state only, and the model has others",
        ),
        (not has_rope, f"no positions of type {model.rope_type}"),
    )
    return next((reason for stands, reason in obstacles if stands), None)
