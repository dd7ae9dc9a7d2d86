"""What calibration windows are drawn from: all windows of each text, shuffled by seed.

Shapes: N windows, T tokens in a window, R tokens in a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.errors import TextError, UsageError
from cfsp.settings import DEFAULT_SAMPLES, Text
from cfsp.text.cutting import gather, spans
from cfsp.text.image_windows import ImageWindows, ProcessorOf, shuffled
from cfsp.text.mixed import parts_of
from cfsp.text.sources import TextSource, name_of
from cfsp.text.stream import token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How much more text than needed windows are drawn from, where a source is that long.
_POOL_FACTOR = 16
# Of samples with images, how many are held to be drawn from, for each window.
_SAMPLES_TOGETHER = 4


@dataclass(frozen=True)
class ShuffledPool:
    """The windows of one text in the order in which they are drawn, and how many are."""

    name: str
    tokens_NT: Tensor
    share: int
    images_N: tuple[Mapping[str, Tensor], ...] = ()


def shuffled_pools(
    texts: Sequence[str | Text],
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None,
    seqlen: int,
    seed: int,
    begins_with: tuple[int, ...],
    processor: ProcessorOf | None = None,
) -> Iterator[ShuffledPool]:
    """Yield the pool of each text; arguments are those of `cfsp.text.drawing.draw_windows`.

    Raises:
        TextError: a text is missing, or holds too few tokens for its share.
        UsageError: samples or seqlen is too small.
    """
    if (samples is not None and samples < len(texts)) or seqlen < 2 + len(begins_with[1:]):
        raise UsageError(
            f"expected at least one window for each text and 2 tokens in a window, "
            f"found {samples} windows for {len(texts)} texts and {seqlen} tokens"
        )
    wanted = DEFAULT_SAMPLES if samples is None else samples
    generator = torch.Generator().manual_seed(seed)
    for text, share in parts_with_shares(texts, wanted):
        source = TextSource(text, "calibration")
        least = 1 if samples is None else share
        if processor is not None and source.has_images:
            order = shuffled(source.samples(), generator, _SAMPLES_TOGETHER * share)
            made = ImageWindows(order, processor(), seqlen, begins_with)
            yield _image_pool(source.name, made, share, least)
            continue
        stream_R = token_stream(source, tokenizer, _POOL_FACTOR * max(share, 1) * seqlen)
        pool_NT = gather(stream_R, spans(stream_R, seqlen, begins_with), seqlen, begins_with)
        have = len(pool_NT)
        if have < least:
            raise TextError(
                f"{source.name} holds {have} windows of {seqlen} tokens, {share} are needed "
                f"({share * (seqlen - len(begins_with))} tokens); give more text, fewer --samples "
                "or a shorter --seqlen"
            )
        yield ShuffledPool(source.name, pool_NT[torch.randperm(have, generator=generator)], share)


def parts_with_shares(texts: Sequence[str | Text], total: int) -> list[tuple[str | Text, int]]:
    """Return what windows are drawn from, kinds of the mixed text apart, and how many of each."""
    found: list[tuple[str | Text, int]] = []
    for text, share in zip(texts, _shares(total, len(texts)), strict=True):
        parts = parts_of(text) if isinstance(text, str) else (text,)
        found += zip(parts, _shares(share, len(parts)), strict=True)
    return found


def _image_pool(name: str, made: ImageWindows, share: int, least: int) -> ShuffledPool:
    """Return as many windows with images as are drawn.

    Raises:
        TextError: there are too few.
    """
    windows = made.take(share)
    if len(windows) < least:
        cure = "give more samples, fewer --samples or a shorter --seqlen"
        if made.left_out:
            cure = (
                f"{made.left_out} samples have images that need up to {made.needed} tokens: raise "
                "--seqlen to at least that, or give smaller images"
            )
        raise TextError(
            f"{name} holds {len(windows)} windows of {made.seqlen} tokens with images, {share} are "
            f"needed; {cure}"
        )
    tokens_NT = torch.stack([window.tokens_T for window in windows])
    return ShuffledPool(name, tokens_NT, share, tuple(window.images for window in windows))


def sources_drawn(texts: Sequence[str | Text], samples: int) -> int:
    """Return from how many sources so many windows are drawn; a kind of the mixed text is one."""
    drawn = {name_of(part) for part, share in parts_with_shares(texts, samples) if share}
    return len(drawn)


def _shares(total: int, parts: int) -> list[int]:
    """Share a number out as evenly as possible."""
    return [total // parts + (i < total % parts) for i in range(parts)]
