"""From texts to windows: drawn by seed to calibrate on, consecutive to measure on.

Shapes: N windows, T tokens in a window, R tokens of a stream, P that a window begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cfsp.errors import TextError, UsageError
from cfsp.settings import Bos, Text
from cfsp.text.cutting import gather, overlapping_spans, spans
from cfsp.text.image_windows import ProcessorOf
from cfsp.text.pools import parts_with_shares, shares_within, shuffled_pools
from cfsp.text.sources import TextSource, name_of
from cfsp.text.stream import first_tokens
from cfsp.text.tokenizers import beginning
from cfsp.text.windows import Windows, joined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.settings import CalibrationText


def draw_text(
    text: CalibrationText,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorOf | None = None,
) -> Windows:
    """Draw calibration windows evenly from each text, without overlap, by seed.

    The kinds of the mixed text are drawn from evenly too, each as a source of its own. What a text
    has too few windows for is drawn from the others; a long one is drawn from all over.

    Args:
        text: what to draw from, and how much.
        tokenizer: the model's own.
        processor: loads that of the model, for texts with images; None if it reads text alone.

    Raises:
        TextError: a text is missing or holds no window, or all hold too few.
        UsageError: samples or seqlen is too small, or there is no BOS.
        CheckpointError: a text has images, and the model no processor.
    """
    pools = shuffled_pools(text, tokenizer, processor)
    return _first_of([pool.windows for pool in pools], [pool.share for pool in pools])


def draw_left_over(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase, count: int
) -> Windows:
    """Draw `count` windows that `draw_text` does not draw, as evenly from each text as there are.

    Raises:
        TextError: the texts have not so many windows left.
        UsageError: a text has images.
    """
    if any(TextSource(name, "calibration").has_images for name in text.names):
        raise UsageError(
            "a loss is measured on text alone, and a text to calibrate on has images; give a "
            "--held-out text"
        )
    pools = shuffled_pools(text, tokenizer)
    left = [pool.windows.part(slice(pool.share, None)) for pool in pools]
    even = [share for _, share in parts_with_shares(text.names, count)]
    shares = shares_within(even, [len(windows.tokens_NT) for windows in left])
    if sum(shares) < count:
        taken = sum(pool.share for pool in pools)
        raise TextError(
            f"{', '.join(map(name_of, text.names))}: of {taken + sum(shares)} windows of "
            f"{text.seqlen} tokens calibration takes {taken}; {count} others are needed to measure "
            "on: give fewer --samples, or a --held-out text"
        )
    return _first_of(left, shares)


def _first_of(of_texts: Sequence[Windows], shares: Sequence[int]) -> Windows:
    """Return the first windows of each text, one text after the other."""
    pairs = zip(of_texts, shares, strict=True)
    return joined([windows.part(slice(share)) for windows, share in pairs if share])


def consecutive_windows(
    text: str | Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int | None,
    seqlen: int,
    stride: int | None = None,
    bos: Bos = "auto",
) -> Windows:
    """Return the first `count` windows of a text's evaluation part.

    Args:
        text: see `cfsp.text.sources`.
        tokenizer: the model's own.
        count: windows N; None for all. With a stride, what N windows have without overlap.
        seqlen: tokens in a window, BOS included.
        stride: tokens from one window's start to the next one's; None for windows that do not
            overlap.
        bos: whether windows begin with BOS; see `cfsp.text.tokenizers.beginning`.

    Raises:
        TextError: the text is missing or too short.
        UsageError: count, seqlen or stride is out of range, or there is no BOS.
    """
    begins_with = beginning(tokenizer, bos)
    if (count is not None and count < 1) or seqlen < 2 + len(begins_with[1:]):
        raise UsageError(
            f"expected at least 1 window of 2 tokens, found {count} windows of {seqlen} tokens"
        )
    source = TextSource(text, "evaluation")
    stream_R = first_tokens(source, tokenizer, None if count is None else count * seqlen)
    whole = spans(stream_R, seqlen, begins_with, count)
    have, needed = len(whole), count or 1
    if have < needed:
        raise TextError(
            f"{source.name} holds {have} windows of {seqlen} tokens, {needed} are needed "
            f"({needed * (seqlen - len(begins_with))} tokens); give more text, fewer windows or a "
            "shorter --seqlen"
        )
    windows = Windows(
        gather(stream_R, whole, seqlen, begins_with),
        {source.name: have},
        begins_with,
        evaluation_part=source.has_evaluation_part,
    )
    if stride is None:
        return windows
    stream_R = stream_R[: whole[-1].end]
    overlapping = overlapping_spans(stream_R, seqlen, stride, begins_with)
    return replace(
        windows,
        tokens_NT=gather(stream_R, overlapping, seqlen, begins_with),
        counted_N=torch.tensor([span.scored for span in overlapping]),
        stride=stride,
    )
