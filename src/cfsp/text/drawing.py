"""From texts to windows: drawn by seed to calibrate on, consecutive to measure on.

Shapes: N windows, T tokens in a window, R tokens of a stream, P that a window begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cfsp.errors import TextError, UsageError
from cfsp.settings import DEFAULT_SEQLEN, Bos, Text
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


def draw_windows(
    texts: Sequence[str | Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
    bos: Bos = "auto",
    processor: ProcessorOf | None = None,
) -> Windows:
    """Draw calibration windows evenly from each text, without overlap, by seed.

    The kinds of the mixed text are drawn from evenly too, each as a source of its own. What a text
    has too few windows for is drawn from the others; a long one is drawn from all over.

    Args:
        texts: what to draw from; see `cfsp.text.sources`.
        tokenizer: the model's own.
        samples: windows in all; None for 128, or all that there are if that is less.
        seqlen: tokens in a window, BOS included.
        seed: the same seed draws the same windows from the same text.
        bos: whether windows begin with BOS; see `cfsp.text.tokenizers.beginning`.
        processor: loads that of the model, for texts with images; None if it reads text alone.

    Raises:
        TextError: a text is missing or holds no window, or all hold too few.
        UsageError: samples or seqlen is not positive, or there is no BOS.
        CheckpointError: a text has images, and the model no processor.
    """
    begins_with = beginning(tokenizer, bos)
    pools = shuffled_pools(texts, tokenizer, samples, seqlen, seed, begins_with, processor)
    return joined(
        [
            Windows(
                pool.tokens_NT[: pool.share],
                {pool.name: pool.share},
                begins_with,
                images_N=pool.images_N,
            )
            for pool in pools
            if pool.share
        ]
    )


def draw_text(
    text: CalibrationText,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorOf | None = None,
) -> Windows:
    """Draw the windows of a calibration text; see `draw_windows`."""
    return draw_windows(
        text.names,
        tokenizer,
        samples=text.samples,
        seqlen=text.seqlen,
        seed=text.seed,
        bos=text.bos,
        processor=processor,
    )


def draw_left_over(
    texts: Sequence[str | Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seqlen: int,
    seed: int,
    count: int,
    bos: Bos = "auto",
) -> Windows:
    """Draw windows that `draw_windows` with the same arguments does not draw.

    Args:
        texts: as for `draw_windows`.
        tokenizer: the model's own.
        samples: as for `draw_windows`.
        seqlen: tokens in a window.
        seed: as for `draw_windows`.
        count: windows in all, as evenly from each text as there are.
        bos: as for `draw_windows`.

    Raises:
        TextError: the texts have not so many windows left.
        UsageError: a text has images.
    """
    if any(TextSource(text, "calibration").has_images for text in texts):
        raise UsageError(
            "a loss is measured on text alone, and a text to calibrate on has images; give a "
            "--held-out text"
        )
    begins_with = beginning(tokenizer, bos)
    pools = shuffled_pools(texts, tokenizer, samples, seqlen, seed, begins_with)
    left = [pool.tokens_NT[pool.share :] for pool in pools]
    even = [share for _, share in parts_with_shares(texts, count)]
    shares = shares_within(even, [len(left_NT) for left_NT in left])
    if sum(shares) < count:
        taken = sum(pool.share for pool in pools)
        raise TextError(
            f"{', '.join(map(name_of, texts))}: of {taken + sum(shares)} windows of {seqlen} "
            f"tokens calibration takes {taken}; {count} others are needed to measure on: give "
            "fewer --samples, or a --held-out text"
        )
    return joined(
        [
            Windows(left_NT[:share], {pool.name: share}, begins_with)
            for pool, left_NT, share in zip(pools, left, shares, strict=True)
            if share
        ]
    )


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
