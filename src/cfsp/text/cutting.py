"""A stream of tokens cut into windows: the one place where windows get their BOS.

A window of T tokens begins with the tokens that an input of the model begins with, if any (P of
them, mostly 1 or none), and goes on with T - P tokens of the stream. Where the stream itself has
these tokens there, as chat templates write them, they are not added again.

Shapes: R tokens of the stream, N windows, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.errors import UsageError


@dataclass(frozen=True)
class Span:
    """The part of a stream that one window has; one shorter than it has the beginning before it.

    Attributes:
        begin: first token.
        end: one past the last token.
        scored: how many tokens at the end are predicted and counted.
    """

    begin: int
    end: int
    scored: int


def spans(
    stream_R: Tensor, seqlen: int, begins_with: Sequence[int] = (), count: int | None = None
) -> list[Span]:
    """Return windows one after the other, without overlap; what is left at the end is dropped.

    Every token is scored that has another before it in its window, but for the beginning. There are
    at most `count` windows, if it is given.
    """
    scored = seqlen - max(1, len(begins_with))
    found: list[Span] = []
    begin = 0
    while count is None or len(found) < count:
        end = begin + seqlen - _added(stream_R, begin, begins_with)
        if end > len(stream_R):
            break
        found.append(Span(begin, end, scored))
        begin = end
    return found


def overlapping_spans(
    stream_R: Tensor, seqlen: int, stride: int, begins_with: Sequence[int] = ()
) -> list[Span]:
    """Return windows that begin `stride` tokens after one another, over the whole stream.

    Every token is scored once, but for a first one that has nothing before it. The last window
    ends with the stream and so may advance by less than the stride.

    Raises:
        UsageError: the stride is not in [1, T - P].
    """
    most = seqlen - len(begins_with)
    if not 1 <= stride <= most:
        raise UsageError(
            f"--stride must be between 1 and the window's {most} tokens of text, found {stride}"
        )
    last = len(stream_R) - most
    found: list[Span] = []
    done = 0
    for begin in [*range(0, last, stride), last]:
        added = _added(stream_R, begin, begins_with)
        if begin + seqlen - added > len(stream_R):
            added = len(begins_with)
        end = begin + seqlen - added
        first = max(done, begin + (0 if added else max(1, len(begins_with))))
        found.append(Span(begin, end, end - first))
        done = end
    return found


def gather(
    stream_R: Tensor, spans_N: Sequence[Span], seqlen: int, begins_with: Sequence[int] = ()
) -> Tensor:
    """Return the tokens of the windows [N, T], or what else the stream has of each token."""
    begin_P = torch.tensor(begins_with, dtype=stream_R.dtype)
    rows = [
        torch.cat([begin_P[: seqlen - (span.end - span.begin)], stream_R[span.begin : span.end]])
        for span in spans_N
    ]
    return torch.stack(rows) if rows else stream_R.new_empty((0, seqlen))


def _added(stream_R: Tensor, begin: int, begins_with: Sequence[int]) -> int:
    """Return how many tokens stand before a window's part of the stream."""
    count = len(begins_with)
    if count and stream_R[begin : begin + count].tolist() == list(begins_with):
        return 0
    return count
