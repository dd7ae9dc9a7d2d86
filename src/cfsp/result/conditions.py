"""What a perplexity was measured on, and how: two of them compare only if all of it is equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfsp.architecture.block_names import counted


@dataclass(frozen=True)
class Conditions:
    """Conditions of a perplexity.

    Attributes:
        text: name of the text.
        tokens: predicted tokens.
        windows: how many there were; None where it was not recorded.
        seqlen: tokens of a window; None where it was not recorded.
        stride: tokens from one window to the next; None for windows that do not overlap.
        bos: whether every window begins with the token that the model's input begins with.
    """

    text: str
    tokens: int
    windows: int | None = None
    seqlen: int | None = None
    stride: int | None = None
    bos: bool = False

    @classmethod
    def of(cls, text: str, entry: dict[str, Any]) -> Conditions:
        """Return those of an entry of a manifest or of `cfsp eval --json`."""
        return cls(
            text,
            int(entry["tokens"]),
            entry.get("windows"),
            entry.get("seqlen"),
            entry.get("stride"),
            bool(entry.get("bos", False)),
        )

    def __str__(self) -> str:
        """Return all but the text: `12 windows of 1,024 tokens, with BOS`."""
        bos = "with BOS" if self.bos else "without BOS"
        if self.seqlen is None:
            return f"{self.tokens:,} predicted tokens, windows not recorded, {bos}"
        stride = "" if self.stride is None else f", stride {self.stride:,}"
        windows = "windows" if self.windows is None else counted(self.windows, "windows")
        return f"{windows} of {self.seqlen:,} tokens{stride}, {bos}"


def sources_in_words(sources: Mapping[str, int]) -> str:
    """Return texts with how many windows are of each: `c4 (64 windows), own.txt (1 window)`."""
    return ", ".join(f"{name} ({counted(count, 'windows')})" for name, count in sources.items())
