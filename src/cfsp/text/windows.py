"""Token windows: equally long, mostly not padded, the same for the same seed; and what is held out.

They begin as the model's own tokenizer begins an input: with BOS where it adds one.

Held out are windows that repair is judged by, and documents that recovery is: of every text, of
every kind of the mixed one, and spread over it.

Shapes: N windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cfsp.text.offline import comes_with_cfsp

HELD_OUT_WINDOWS = 4
_LEAST_STRIDE = 8


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from."""

    tokens_NT: Tensor  # token ids, int64
    sources: dict[str, int]  # how many windows each gave, by its name, one after the other
    begins_with: tuple[int, ...] = ()  # tokens that every window begins with: BOS, or none
    counted_N: Tensor | None = None  # how many at the end of each count; None for all predicted
    evaluation_part: bool = False  # whether nothing is fitted to this part of the text
    padding_N: Tensor | None = None  # how many at the end of each are no text; None for none

    def part(self, windows: slice) -> Windows:
        """Return some of the windows."""
        return self.at(range(len(self.tokens_NT))[windows])

    def at(self, places: Sequence[int]) -> Windows:
        """Return the windows at these places, ascending."""
        rows = list(places)
        ends, names = list(accumulate(self.sources.values())), list(self.sources)
        return replace(
            self,
            tokens_NT=self.tokens_NT[rows],
            sources=dict(Counter(names[bisect_right(ends, row)] for row in rows)),
            counted_N=None if self.counted_N is None else self.counted_N[rows],
            padding_N=None if self.padding_N is None else self.padding_N[rows],
        )

    def by_source(self) -> list[Windows]:
        """Return the windows of each source."""
        pairs = pairwise([0, *accumulate(self.sources.values())])
        return [self.part(slice(start, end)) for start, end in pairs]

    @property
    def bos(self) -> bool:
        """Whether every window begins with BOS."""
        return bool(self.begins_with)

    @property
    def scored_N(self) -> Tensor:
        """How many tokens at the end of each window's text are predicted and counted, int64."""
        if self.counted_N is not None:
            return self.counted_N
        count, length = self.tokens_NT.shape
        # The first token has no context.
        return torch.full((count,), length - max(1, len(self.begins_with)))

    @property
    def held_out_N(self) -> Tensor:
        """Which windows repair is judged by instead of fitted to; see `is_held_out`."""
        return is_held_out(list(self.sources.values()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the exact token ids and their shape, as hex."""
        digest = hashlib.sha256(str(tuple(self.tokens_NT.shape)).encode())
        digest.update(self.tokens_NT.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def few_windows(windows: Windows, count: int) -> Windows:
    """Return at most `count` windows: some of every source, and more of a larger one.

    Those of a source are spread evenly over it. Where there are fewer windows than sources, the
    user's own texts come before those that come with cfsp.
    """
    sizes = list(windows.sources.values())
    own = [not comes_with_cfsp(name) for name in windows.sources]
    shares = [0] * len(sizes)

    def urgency(source: int) -> tuple[bool, bool, float]:
        """One that gave none comes first, then the one that lacks most, by d'Hondt's rule."""
        first = not shares[source]
        return first, first and own[source], sizes[source] / (shares[source] + 1)

    for _ in range(min(count, sum(sizes))):
        shares[max(range(len(shares)), key=urgency)] += 1
    return windows.at(
        [
            end - size + (2 * step + 1) * size // (2 * share)
            for end, size, share in zip(accumulate(sizes), sizes, shares, strict=True)
            for step in range(share)
        ]
    )


def joined(parts: Sequence[Windows]) -> Windows:
    """Return windows of several texts, which are equally long, one text after the other."""
    sources = sum((Counter(part.sources) for part in parts), Counter())
    tokens_NT = torch.cat([part.tokens_NT for part in parts])
    return Windows(tokens_NT, dict(sources), parts[0].begins_with)


def is_held_out(parts: Sequence[int]) -> Tensor:
    """Return which windows are held out, as a mask [N], of texts with so many windows each.

    They are spread over all windows, about four of them and at most one of eight; a text that
    would have none holds out its last window, if it has two or more.
    """
    windows = sum(parts)
    stride = min(windows, max(_LEAST_STRIDE, math.ceil(windows / HELD_OUT_WINDOWS)))
    mask_N = torch.arange(windows) % stride == stride - 1
    end = 0
    for count in parts:
        start, end = end, end + count
        if count > 1 and not bool(mask_N[start:end].any()):
            mask_N[end - 1] = True
    return mask_N


def held_out_documents(sizes: Sequence[int], least: int) -> list[bool]:
    """Return which documents are held out: the last one, and more at equal distances before it.

    `sizes` are the tokens of each document of a text. At least so many tokens are held out, and at
    most those of one document more.
    """
    total, seen, held = sum(sizes), 0, 0
    chosen: list[bool] = []
    for size in reversed(sizes):
        seen += size
        chosen.append(held * total < least * seen)
        held += size * chosen[-1]
    return chosen[::-1]


def digests_of(windows: Mapping[str, Windows]) -> dict[str, str]:
    """Return the digest of the windows of every text, by its name."""
    return {name: of_text.digest for name, of_text in windows.items()}
