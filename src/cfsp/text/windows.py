"""Token windows: equally long, never padded, the same for the same seed.

They begin as the model's own tokenizer begins an input: with BOS where it adds one.

Shapes: N windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from cfsp.errors import UsageError
from cfsp.text.hold_out import is_held_out


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from.

    Attributes:
        tokens_NT: token ids, int64.
        sources: name of each source and how many windows it gave.
        begins_with: token ids that every window begins with: BOS, or none.
        counted_N: of windows that overlap, how many tokens at the end of each no earlier one
            has; None for windows that each stand on their own.
        stride: tokens from one window's start to the next one's; likewise.
        images_N: what the model is given of each window besides its tokens, such as pixel values;
            nothing of a window without images. Empty where no window has any.
    """

    tokens_NT: Tensor
    sources: dict[str, int]
    begins_with: tuple[int, ...] = ()
    counted_N: Tensor | None = None
    stride: int | None = None
    images_N: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether any window has images."""
        return any(self.images_N)

    def images_of(self, window: int) -> Mapping[str, Tensor]:
        """Return what the model is given of a window besides its tokens."""
        return self.images_N[window] if self.images_N else {}

    def part(self, windows: slice) -> Windows:
        """Return some of the windows; where they came from is told of all."""
        counted_N = None if self.counted_N is None else self.counted_N[windows]
        return replace(
            self,
            tokens_NT=self.tokens_NT[windows],
            counted_N=counted_N,
            images_N=self.images_N[windows],
        )

    def by_source(self) -> list[Windows]:
        """Return the windows of each source; all together where it isn't known which are whose."""
        if sum(self.sources.values()) != len(self.tokens_NT):
            return [self]
        ends = accumulate(self.sources.values())
        return [
            replace(self.part(slice(end - count, end)), sources={name: count})
            for (name, count), end in zip(self.sources.items(), ends, strict=True)
            if count
        ]

    @property
    def bos(self) -> bool:
        """Whether every window begins with BOS."""
        return bool(self.begins_with)

    @property
    def scored_N(self) -> Tensor:
        """How many tokens at the end of each window are predicted and counted, int64."""
        if self.counted_N is not None:
            return self.counted_N
        count, length = self.tokens_NT.shape
        # The first token has no context.
        return torch.full((count,), length - max(1, len(self.begins_with)))

    @property
    def held_out_N(self) -> Tensor:
        """Which windows repair is judged by instead of fitted to; see `is_held_out`."""
        parts = tuple(self.sources.values())
        whole = (len(self.tokens_NT),)
        return is_held_out(parts if sum(parts) == sum(whole) else whole)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the exact token ids, their shape, and all of the images, as hex."""
        digest = hashlib.sha256(str(tuple(self.tokens_NT.shape)).encode())
        digest.update(self.tokens_NT.to(torch.int64).contiguous().numpy().tobytes())
        for window, images in enumerate(self.images_N):
            for name, value in sorted(images.items()):
                digest.update(f"{window} {name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_is_text(windows: Windows, needed_by: str) -> None:
    """Check that windows have no images, for what reads tokens alone.

    Raises:
        UsageError: some have.
    """
    if windows.has_images:
        names = ", ".join(windows.sources)
        raise UsageError(
            f"{needed_by} reads text alone, and the text to calibrate on ({names}) has images; "
            "leave it out, or give text"
        )


def few_windows(windows: Windows, count: int) -> Windows:
    """Return at most `count` windows, by equal steps from the first: of most texts some."""
    stride = max(1, len(windows.tokens_NT) // count)
    return windows.part(slice(0, stride * count, stride))


def joined(parts: Sequence[Windows]) -> Windows:
    """Return windows of several texts, which are equally long, one text after the other."""
    sources: dict[str, int] = {}
    for part in parts:
        for name, count in part.sources.items():
            sources[name] = sources.get(name, 0) + count
    images_N = [part.images_of(i) for part in parts for i in range(len(part.tokens_NT))]
    return Windows(
        torch.cat([part.tokens_NT for part in parts]),
        sources,
        parts[0].begins_with,
        images_N=tuple(images_N) if any(images_N) else (),
    )
