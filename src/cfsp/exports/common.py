"""What all formats share: what they ask of a model, and whether a copy is the same one.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CheckpointError, ExportError
from cfsp.streaming.decoder_end import logits_of, text_model
from cfsp.text.tokenizers import load_tokenizer

PROBE_TOKENS = 24
_PROBE_TEXT = (
    "The harbour was quiet when the first boats came in. Nobody had expected them before noon, "
    "and the few people on the quay put down what they were carrying and watched."
)


@dataclass(frozen=True)
class Verification:
    """How far a written copy is from the checkpoint."""

    reader: str  # what read the copy
    tokens: int  # of the probe
    max_difference: float  # largest absolute one of a logit
    relative_error: float  # root mean square of the differences by that of the logits
    tolerance: float  # what `relative_error` may be


@dataclass(frozen=True)
class Written:
    """What a format wrote."""

    layout: str  # what software will see: a class, an architecture, a weight type
    verify: Callable[[], Verification] | None  # compares the copy; None if nothing reads it here
    notes: list[str]  # what the user should know, one sentence each
    serve: str = ""  # the command that serves the copy, which is `{out}`


def verified(
    source: Checkpoint,
    reader: str,
    feed: Callable[[list[int]], Tensor],
    tolerance: float,
    *,
    context: int,
) -> Verification:
    """Compare what a runtime computes of a copy with what transformers computes of the checkpoint.

    `feed` reads more tokens of one sequence and returns logits_TV after each: half of the probe is
    read at once, the rest token by token, as in decoding. The copy can read `context`. Their root
    mean square may differ by `tolerance`, relative to that of the logits.
    """
    tokens = probe_tokens(source, min(PROBE_TOKENS, context))
    with torch.inference_mode():
        reference = text_model(load(source.directory, dtype=torch.float32))
        expected_TV, half = logits_of(reference, torch.tensor([tokens]))[0], (len(tokens) + 1) // 2
    found_TV = torch.cat([feed(tokens[:half]), *(feed([token]) for token in tokens[half:])])
    difference_TV = (found_TV.double() - expected_TV.double()).abs()
    error = float(
        difference_TV.square().mean().sqrt() / expected_TV.double().square().mean().sqrt()
    )
    if not math.isfinite(error) or error > tolerance:
        raise ExportError(
            f"the copy as {reader} reads it computes something else: relative error of the logits "
            f"{error:.2g}, expected at most {tolerance:.2g}; nothing was kept"
        )
    return Verification(reader, len(tokens), float(difference_TV.max()), error, tolerance)


def probe_tokens(source: Checkpoint, count: int) -> list[int]:
    """Return the tokens on which both are compared: prose, or ids spread over the vocabulary."""
    vocabulary = vocabulary_of(source.config)
    try:
        tokens = list(load_tokenizer(source.directory)(_PROBE_TEXT)["input_ids"])[:count]
    except CheckpointError:
        tokens = []
    if len(tokens) < count or max(tokens) >= vocabulary:
        step = max(1, vocabulary // (count + 1))
        tokens = [(i + 1) * step % vocabulary for i in range(count)]
    return tokens


def context_limit(config: Any, *, has_windows: bool = False) -> tuple[int, str | None]:
    """Return how many tokens the copy may read, and why if it is less than the model may."""
    # A window changes nothing as long as the text fits into it: graphs without it are right then.
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    if has_windows or window is None or not slides or int(window) >= length:
        return length, None
    return int(window), (
        f"the model attends to the last {window} tokens in some blocks, which this format cannot "
        f"say: the context is limited to {window} tokens instead of {length}"
    )


def heads_of_blocks(source: Checkpoint) -> list[tuple[int, int]]:
    """Return the numbers of query heads and KV heads of every block."""
    config: Any = source.config
    heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    found = [(heads, groups)] * source.architecture.block_count
    for unit in source.architecture.of_part("kv").stock_units:
        found[unit.block] = heads // groups * unit.width, unit.width
    return found


def unread_norms(source: Checkpoint) -> set[str]:
    """Return the norms before attention layers that are gone: stored, and read by nobody."""
    prefixes = (source.architecture.block_prefix(unit.block) for unit in source.architecture.gone)
    return {f"{prefix}input_layernorm.weight" for prefix in prefixes}
