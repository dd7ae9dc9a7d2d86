"""Is a written copy the same model? Logits of both over one probe, and greedy decoding.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.engine.decoder_end import text_model
from cfsp.errors import CheckpointError, ExportError
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 24
GREEDY_STEPS = 32
_PROBE_TEXT = (
    "The harbour was quiet when the first boats came in. Nobody had expected them before noon, "
    "and the few people on the quay put down what they were carrying and watched."
)


@dataclass(frozen=True)
class Verification:
    """How far a written copy is from the checkpoint.

    Attributes:
        reader: what read the copy.
        tokens: length of the probe.
        max_difference: largest absolute difference of a logit.
        relative_error: root mean square of the differences by that of the logits.
        tolerance: what `relative_error` may be.
        greedy_steps: decoded tokens that are equal; None if decoding was not compared.
    """

    reader: str
    tokens: int
    max_difference: float
    relative_error: float
    tolerance: float
    greedy_steps: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


def probe_lengths(context: int) -> tuple[int, int]:
    """Return how many tokens to probe and to decode with a copy that reads `context` tokens."""
    probe = min(PROBE_TOKENS, max(1, context // 2))
    return probe, max(1, min(GREEDY_STEPS, context - probe))


def probe_tokens(source: Checkpoint, count: int = PROBE_TOKENS) -> list[int]:
    """Return the tokens on which both are compared: prose, or ids spread over the vocabulary.

    Args:
        source: the checkpoint.
        count: how many.
    """
    vocabulary = vocabulary_of(source.config)
    try:
        tokens = list(load_tokenizer(source.directory)(_PROBE_TEXT)["input_ids"])[:count]
    except CheckpointError:
        tokens = []
    if len(tokens) < count or max(tokens) >= vocabulary:
        step = max(1, vocabulary // (count + 1))
        tokens = [(i + 1) * step % vocabulary for i in range(count)]
    return tokens


def reference_model(source: Checkpoint) -> PreTrainedModel:
    """Return the checkpoint as transformers runs it, in float32."""
    return load(source.directory, dtype=torch.float32)


def logits_of(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Return the logits_TV of a transformers model, in float32."""
    with torch.inference_mode():
        output = text_model(model)(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    logits_TV: Tensor = output.logits[0].float().cpu()
    return logits_TV


def greedy_after(
    model: PreTrainedModel, tokens: Sequence[int], continuation: Sequence[int]
) -> list[int]:
    """Return the most likely token of a transformers model before each of the continuation.

    It equals the continuation exactly if the model, decoding greedily, writes the same: one
    forward pass instead of one a token.
    """
    logits_TV = logits_of(model, [*tokens, *continuation[:-1]])
    return [int(token) for token in logits_TV[len(tokens) - 1 :].argmax(dim=-1)]


def greedy_by(
    next_logits: Callable[[list[int]], Tensor], tokens: Sequence[int], steps: int = GREEDY_STEPS
) -> list[int]:
    """Return the most likely continuation by any runtime.

    Args:
        next_logits: feeds new tokens, keeping what went before, and returns logits_V of the last.
        tokens: the prompt.
        steps: tokens to decode.
    """
    chosen: list[int] = []
    new = list(tokens)
    for _ in range(steps):
        new = [int(next_logits(new).argmax())]
        chosen += new
    return chosen


def compare_logits(
    reader: str,
    expected_TV: Tensor,
    found_TV: Tensor,
    tolerance: float,
    greedy: tuple[list[int], list[int]] | None = None,
) -> Verification:
    """Compare two sets of logits, and two continuations if given.

    Args:
        reader: what read the copy, for the message.
        expected_TV: of the checkpoint.
        found_TV: of the copy.
        tolerance: largest root mean square of the differences, relative to that of the logits.
        greedy: what the checkpoint would write (see `greedy_after`) and what the copy wrote.

    Raises:
        ExportError: they differ by more.
    """
    difference_TV = (found_TV.double() - expected_TV.double()).abs()
    largest = float(difference_TV.max())
    error = float(
        difference_TV.square().mean().sqrt() / expected_TV.double().square().mean().sqrt()
    )
    if not math.isfinite(error) or error > tolerance:
        raise ExportError(
            f"the copy as {reader} reads it computes something else: relative error of the logits "
            f"{error:.2g}, expected at most {tolerance:.2g}; nothing was kept"
        )
    steps = None
    if greedy is not None:
        expected, found = greedy
        steps = len(expected)
        if found != expected:
            same = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
            raise ExportError(
                f"the copy as {reader} reads it decodes other tokens from step {same} on "
                f"(token {found[same]}, expected {expected[same]}); nothing was kept"
            )
    return Verification(reader, len(expected_TV), largest, error, tolerance, steps)
