"""A text as one stream of tokens: its beginning, or pieces from all over it.

Text is cut before it is made tokens, so that no more is made than is asked for.

Shapes: R tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
    """Return the tokens that a text begins with, as int64 [R].

    After `limit` tokens no more is read; None is for the whole text.

    Raises:
        TextError: the text is missing or not readable.
    """
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

    A local text is read to its end, and a few megabytes of it are held. Of a data set on the hub,
    which may have none, the beginning is taken.

    Args:
        source: the text.
        tokenizer: the model's own.
        needed: tokens that will be needed; what is returned has several times as many.
        seed: of the choice of pieces.

    Raises:
        TextError: the text is missing or not readable.
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
    """Yield the tokens of one document after the other, as int64 [R], with what separates them.

    Raises:
        TextError: the text is missing or not readable.
    """
    separator = source.separator
    for document in source.documents(tokenizer):
        pieces = _cut(document + separator, _CHUNK_CHARACTERS)
        yield torch.cat([_tokens(piece, tokenizer) for piece in pieces])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    with warnings.catch_warnings():
        # "sequence longer than the model's maximum": it is cut into windows later.
        warnings.simplefilter("ignore")
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
