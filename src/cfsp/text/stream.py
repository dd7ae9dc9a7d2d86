"""A text as one stream of tokens, from its beginning or from all over it, and cut into windows.

Text is cut before it is made tokens, so that no more is made than is asked for.

A window of T tokens begins with the tokens that an input of the model begins with, if any (P of
them, mostly 1 or none), and goes on with T - P tokens of the stream. Where the stream itself has
these tokens there, as chat templates write them, they are not added again. This is the one place
where windows get their BOS.

Shapes: R tokens of the stream, N windows, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.text.sources import TextSource

# At most so many characters are made tokens at once.
_CHUNK_CHARACTERS = 1_500_000
# So much of a long text is drawn from, at least: pieces of some windows one after the other.
_DRAWN_CHARACTERS = 4_000_000
_PIECE_CHARACTERS = 16_000
# More than any tokenizer makes one token of, on the mean.
_CHARACTERS_OF_TOKEN = 32


def first_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Tensor:
    """Return the tokens that a text begins with, int64 [R]: all, or `limit` and few more."""
    pieces: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    total = 0
    characters = _CHUNK_CHARACTERS
    if limit is not None:
        characters = min(characters, _CHARACTERS_OF_TOKEN * limit)
    for piece in _pieces(source, tokenizer, characters):
        pieces.append(_tokens(piece, tokenizer))
        total += len(pieces[-1])
        if limit is not None and total >= limit:
            break
    return torch.cat(pieces)


def spread_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, needed: int, seed: int
) -> Tensor:
    """Return the tokens of a text, or of pieces from all over it where it is long, as int64 [R].

    There are several times as many as are `needed`. A local text is read to its end, and a few
    megabytes of it are held. Of a data set on the hub, which may have none, the beginning is taken.
    """
    characters = max(_DRAWN_CHARACTERS, _CHARACTERS_OF_TOKEN * needed)
    count = characters // _PIECE_CHARACTERS
    pieces = _pieces(source, tokenizer, _PIECE_CHARACTERS)
    chosen = list(islice(pieces, count)) if source.on_hub else _sample(pieces, count, Random(seed))
    at_once = _CHUNK_CHARACTERS // _PIECE_CHARACTERS
    chunks = ("".join(chosen[i : i + at_once]) for i in range(0, len(chosen), at_once))
    return torch.cat(
        [torch.empty(0, dtype=torch.int64), *(_tokens(chunk, tokenizer) for chunk in chunks)]
    )


def document_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield the tokens of one document after the other, int64 [R], with what separates them."""
    separator = source.separator
    for document in source.documents(tokenizer):
        pieces = _cut(document + separator, _CHUNK_CHARACTERS)
        yield torch.cat([_tokens(piece, tokenizer) for piece in pieces])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # It is cut into windows later: no word of texts that are longer than the model's maximum.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _sample(pieces: Iterator[str], count: int, random: Random) -> list[str]:
    """Return so many pieces, each as likely as any other, in their order; all if there are less."""
    kept: list[tuple[int, str]] = []
    for number, piece in enumerate(pieces):
        place = number if number < count else random.randrange(number + 1)
        if place < count:
            kept[place : place + 1] = [(number, piece)]
    return [piece for _, piece in sorted(kept)]


def _pieces(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, characters: int
) -> Iterator[str]:
    """Yield a text in strings of at most about so many characters, without a gap."""
    separator = source.separator
    held = ""
    for document in source.documents(tokenizer):
        held += document
        held += separator
        if len(held) > characters:
            *whole, held = _cut(held, characters)
            yield from whole
    if held:
        yield held.removesuffix(separator)


def _cut(text: str, characters: int) -> list[str]:
    """Cut a text into strings of at most so many characters, at ends of lines where there are."""
    pieces = []
    start = 0
    while len(text) - start > characters:
        end = text.rfind("\n", start, start + characters) + 1 or start + characters
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


# The part of a stream that one window has; one shorter than it has the beginning before it.
Span = tuple[int, int]


def spans(
    stream_R: Tensor, seqlen: int, begins_with: Sequence[int] = (), count: int | None = None
) -> list[Span]:
    """Return windows one after the other, without overlap and without what is left at the end."""
    found: list[Span] = []
    begin = 0
    while count is None or len(found) < count:
        end = begin + seqlen - _added(stream_R, begin, begins_with)
        if end > len(stream_R):
            break
        found.append((begin, end))
        begin = end
    return found


def gather(
    stream_R: Tensor, spans_N: Sequence[Span], seqlen: int, begins_with: Sequence[int] = ()
) -> Tensor:
    """Return the tokens of the windows [N, T], or what else the stream has of each token."""
    begin_P = torch.tensor(begins_with, dtype=stream_R.dtype)
    rows = [
        torch.cat([begin_P[: seqlen - (end - begin)], stream_R[begin:end]])
        for begin, end in spans_N
    ]
    return torch.stack(rows) if rows else stream_R.new_empty((0, seqlen))


def _added(stream_R: Tensor, begin: int, begins_with: Sequence[int]) -> int:
    """Return how many tokens stand before a window's part of the stream."""
    count = len(begins_with)
    if count and stream_R[begin : begin + count].tolist() == list(begins_with):
        return 0
    return count
