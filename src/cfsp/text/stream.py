"""A text as one stream of tokens.

Shapes: R tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.text.sources import TextSource

# Between documents; conversations have what their template puts there.
_SEPARATOR = "\n\n"
_CHUNK_CHARACTERS = 4_000_000
# More than any tokenizer makes one token of, on the mean.
_CHARACTERS_OF_TOKEN = 32


def token_stream(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    *,
    no_more: bool = False,
) -> Tensor:
    """Return the tokens of a text, as int64 [R].

    Args:
        source: the text.
        tokenizer: the model's own.
        limit: tokens after which no more is read; None for the whole text.
        no_more: whether what was read beyond the limit is of no use, so that little should be.

    Raises:
        TextError: the text is missing or not readable.
    """
    pieces: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    total = 0
    separator = "" if source.is_chat else _SEPARATOR
    characters = _CHUNK_CHARACTERS
    if no_more and limit is not None:
        characters = min(characters, _CHARACTERS_OF_TOKEN * limit)
    for chunk in _chunks(source.documents(tokenizer), separator, characters):
        with warnings.catch_warnings():
            # "sequence longer than the model's maximum": it is cut into windows later.
            warnings.simplefilter("ignore")
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        total += len(ids)
        if limit is not None and total >= limit:
            break
    return torch.cat(pieces)


def _chunks(documents: Iterator[str], separator: str, characters: int) -> Iterator[str]:
    """Join documents into strings of about so many characters."""
    held: list[str] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= characters:
            yield separator.join(held) + separator
            held, size = [], 0
    if held:
        yield separator.join(held)
