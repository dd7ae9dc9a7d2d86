"""Targets `vllm` and `mlx-lm`: DeciLM's layout, which both read.

DeciLM is a Llama whose blocks have widths of their own, or no attention (`no_op`). Weights are
copied byte for byte. `block_configs` has each width: as `ffn_mult` where all are multiples of 256,
which readers turn into exactly these; otherwise as `intermediate_size`, which only vLLM reads. The
number of query heads is that of the whole model, so a block that has lost KV groups, with their
query heads, cannot be said. For vLLM, which wants the blocks as attributes, a small config class
lies beside it; mlx-lm would only ask the user about it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import __version__

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.loading import own_dtype
from cfsp.checkpoint.own_files import CONFIG_FILE, copy_travelling_files
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import resized_parts
from cfsp.checkpoint.tensor_file import MadeTensor, StoredTensor, write_shards
from cfsp.checkpoint.text_config import head_size
from cfsp.errors import CannotSayError
from cfsp.exports.common import Written, context_limit, heads_of_blocks, unread_norms

ARCHITECTURE = "DeciLMForCausalLM"
_CODE_FILE = "configuration_decilm.py"

LIKE_LLAMA = ("llama", "mistral", "qwen2")
# What a Llama has and the model's config says in the same words.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "sliding_window", "layer_types",
)  # fmt: skip
ROUNDING = 256  # readers round a width that is given as `ffn_mult` up to a multiple of this
# The ways to scale positions that mlx-lm has.
_ROPE_OF_MLX = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Reader:
    """Software that reads DeciLM's layout."""

    name: str
    serve: str  # the command that serves a directory `{out}`
    trust: str  # the flag for the class of config that it wants; empty if it wants none
    otherwise: str  # what else to do with a model that is no Llama


VLLM = Reader(
    "vLLM",
    "vllm serve {out}",
    "--trust-remote-code",
    ", or use its Transformers backend, which runs the checkpoint itself where it can: vllm serve "
    "{directory} --trust-remote-code --model-impl transformers",
)
MLX_LM = Reader("mlx-lm", "mlx_lm.server --model {out}", "", "")


def write(reader: Reader, source: Checkpoint, out: Path) -> Written:
    """Write the checkpoint for one reader into a directory; one of a stock class as such."""
    check(reader, source)
    notes = [f"nothing here reads the copy back: {reader.name} was not run"]
    if is_stock := _is_stock(source.config):
        fields, tensors = _stock_fields(reader, source), source.stored.tensors
        layout = source.architecture.class_name
        notes.append(
            f"all blocks are equally wide: {reader.name}'s own class for "
            f"{source.config.model_type} runs it, if it has one"
        )
    else:
        fields, tensors = decilm_config(source), _described_tensors(source)
        widths, gone = _widths(source), len(source.architecture.gone)
        layout = f"{ARCHITECTURE}, {len(widths)} blocks of {min(widths)} to {max(widths)} channels"
        layout += f", {gone} without attention" if gone else ""
    # transformers takes a head that is stored whatever is said here; others do not.
    if "lm_head.weight" in source.parameters.keys() - source.copies:
        for part in (fields, fields.get("text_config", {})):  # each reader asks one of them
            part["tie_word_embeddings"] = False
    trust = "" if is_stock else reader.trust
    if trust:
        fields["auto_map"] = {"AutoConfig": f"{_CODE_FILE.removesuffix('.py')}.DeciLMConfig"}
        code = resources.files("cfsp.exports").joinpath("decilm_config_template.txt").read_text()
        (out / _CODE_FILE).write_text(code, encoding="utf-8")
        notes.append(f"{reader.name} loads it with {trust}, because of its config class")
    write_shards(out, tensors)
    copy_travelling_files(source.directory, out)
    (out / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return Written(layout, None, notes, f"{reader.serve} {trust}".rstrip())


def check(reader: Reader, source: Checkpoint) -> None:
    """Check that a reader runs what would be written for it."""
    model_type = source.config.model_type
    if _is_stock(source.config):
        return
    if model_type not in LIKE_LLAMA:
        without = "and without --parts attention " if source.architecture.gone else ""
        raise CannotSayError(
            f"{reader.name}'s DeciLM class is a Llama and cannot express {model_type}",
            f"prune with --widths equal {without}for {reader.name}'s own class"
            + reader.otherwise.format(directory=shlex.quote(str(source.directory))),
        )
    if reason := _obstacle(reader, source):
        raise CannotSayError(f"{reader.name} reads DeciLM with {reason}")
    for name in source.stored.unused:
        raise CannotSayError(f"{reader.name}'s DeciLM class has no place for the tensor {name}")


def _is_stock(config: Any) -> bool:
    """Return whether a reader's own class for the type builds a checkpoint, if it has one.

    That for Qwen2, whose configs name no size of a head, takes it from the hidden size.
    """
    is_told = config.model_type not in LIKE_LLAMA or "head_dim" in config.__dataclass_fields__
    is_whole = is_told or head_size(config) * config.num_attention_heads == config.hidden_size
    return is_whole and not resized_parts(config)


def _obstacle(reader: Reader, source: Checkpoint) -> str | None:
    """Return what a reader cannot run of a Llama-like checkpoint, as the end of a sentence."""
    config: Any = source.config
    heads, groups = zip(*heads_of_blocks(source), strict=True)
    of_attentions = sorted(set(groups) - {0})
    if len(of_attentions) > 1:
        return (
            "one number of heads for all attention layers (n_heads_in_group says only how many of "
            f"them share keys and values), and the model's have {of_attentions[0]} to "
            f"{of_attentions[-1]} KV groups"
        )
    if reader is VLLM:
        in_first = "an attention in the first block, and the model has none there"
        return None if groups[0] else in_first
    if head_size(config) * max(heads) != config.hidden_size:
        return "heads that are together as wide as the hidden state only, and the model has others"
    odd = sum(width % ROUNDING > 0 for width in _widths(source))
    if odd:
        return (
            f"widths that are multiples of {ROUNDING} only, and {odd} of {len(groups)} blocks have "
            f"others; prune with --set multiple={ROUNDING}"
        )
    if config.hidden_act != "silu":
        return f"the activation silu only, and the model has {config.hidden_act}"
    if context_limit(config)[1] is not None:
        return "no sliding window, and the model has one"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    return None if rope_type in _ROPE_OF_MLX else f"no positions of type {rope_type}"


def ffn_mult(width: int, hidden: int) -> float:
    """Return the multiple of the hidden size that readers turn into exactly this width.

    They take two thirds of it, cut the fraction off and round up to 256. Aiming at the middle
    of the last 256 channels leaves room for six decimals, which is what mlx-lm keeps.
    """
    return round(3 * (width - ROUNDING // 2) / (2 * hidden), 6)


def _widths(source: Checkpoint) -> list[int]:
    return source.architecture.of_part("ffn").widths


def _has_multiples(source: Checkpoint) -> bool:
    return all(width % ROUNDING == 0 for width in _widths(source))


def decilm_config(source: Checkpoint) -> dict[str, Any]:
    """Return config.json of a Llama-like checkpoint in DeciLM's terms."""
    config: Any = source.config
    heads_of, groups_of = zip(*heads_of_blocks(source), strict=True)
    heads, groups = max(heads_of), max(groups_of)
    prefix = source.architecture.block_prefix(groups_of.index(groups))
    biased = {m: f"{prefix}self_attn.{m}_proj.bias" in source.specs for m in "qkvo"}
    widths = _widths(source)
    fields = {key: getattr(config, key) for key in _SHARED if hasattr(config, key)}
    fields = {key: value for key, value in fields.items() if value is not None}
    if fields.get("sliding_window") and "layer_types" not in fields:
        fields["layer_types"] = ["sliding_attention"] * len(widths)
    if groups != config.num_key_value_heads:
        fields |= {
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_size(config),
        }
    for_all = _has_multiples(source)
    word = "ffn_mult" if for_all else "intermediate_size"
    said_widths = [ffn_mult(width, config.hidden_size) if for_all else width for width in widths]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "nemotron-nas",
        "dtype": str(own_dtype(source)).removeprefix("torch."),
        # Loaders look at it to know how old the words of a config are.
        "transformers_version": getattr(config, "transformers_version", None) or __version__,
        **fields,
        **(_old_rope_words(config.rope_parameters) if for_all else {}),
        "intermediate_size": max(widths),
        # mlx-lm has biases in all four projections or in none.
        "attention_bias": biased["o"] or (for_all and biased["q"]),
        "qkv_bias": biased["q"],
        "mlp_bias": f"{prefix}mlp.up_proj.bias" in source.specs,
        "block_configs": [
            {
                "attention": {
                    "no_op": own == 0,
                    "n_heads_in_group": heads // groups if own else None,
                },
                "ffn": {"no_op": False, word: width},
            }
            for width, own in zip(said_widths, groups_of, strict=True)
        ],
    }


def _described_tensors(source: Checkpoint) -> dict[str, StoredTensor]:
    """Return what readers build: with the zeros that mlx-lm expects beside biases of q, k and v."""
    unread = unread_norms(source)
    every = source.stored.tensors
    found = {name: tensor for name, tensor in every.items() if name not in unread}
    for block in range(source.architecture.block_count) if _has_multiples(source) else ():
        prefix = f"{source.architecture.block_prefix(block)}self_attn."
        if f"{prefix}q_proj.bias" in source.specs and f"{prefix}o_proj.bias" not in source.specs:
            spec = source.specs[f"{prefix}o_proj.weight"]
            bias = torch.zeros(spec.shape[0], dtype=spec.dtype)
            found[f"{prefix}o_proj.bias"] = MadeTensor.of(bias)
    return found


def _stock_fields(reader: Reader, source: Checkpoint) -> dict[str, Any]:
    fields = read_plain_fields(source.directory)
    fields["architectures"] = [source.architecture.class_name]
    rope = fields.get("rope_parameters") or {}
    # Without a base of their own, the settings are those of several kinds of blocks.
    if reader is MLX_LM and "rope_theta" in rope and "rope_theta" not in fields:
        fields |= _old_rope_words(rope)
    return fields


def _old_rope_words(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the positions' settings as transformers called them before version 5."""
    words: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        words["rope_scaling"] = scaling
    return words
