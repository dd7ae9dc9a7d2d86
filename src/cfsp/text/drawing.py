"""From texts to windows: drawn by seed to calibrate on, consecutive to measure on.

Each text is a pool: its windows, shuffled by seed. One that is named twice, or as a part of another
one, is one pool, so that no window is drawn twice.

A text becomes one stream of tokens, from its beginning or from all over it. It is cut before it is
made tokens, so that no more is made than is asked for. A window of T tokens begins with the tokens
that an input of the model begins with, if any (P of them, mostly 1 or none), and goes on with T - P
tokens of the stream. Where the stream itself has these tokens there, as chat templates write them,
they are not added again. This is the one place where windows get their BOS.

Shapes: N windows, T tokens in a window, R tokens of a stream, P that a window begins with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import islice
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cfsp.architecture.block_names import counted
from cfsp.errors import TextError, UsageError
from cfsp.settings import DEFAULT_TEXT, Bos, CalibrationText, Text
from cfsp.text.offline import parts_of
from cfsp.text.records import Conversation
from cfsp.text.sources import TextSource, identity_of, name_of
from cfsp.text.tokenizers import beginning, encoded
from cfsp.text.windows import Windows, joined

log = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 1_500_000  # at most so many characters are made tokens at once
# So much of a long text is drawn from, at least: pieces of some windows one after the other.
_DRAWN_CHARACTERS = 4_000_000
_PIECE_CHARACTERS = 16_000
_TOGETHER = 16  # pieces of a text file
_CHARACTERS_OF_TOKEN = 32  # more than any tokenizer makes one token of, on the mean


def calibration_windows(tokenizer: PreTrainedTokenizerBase, text: CalibrationText) -> Windows:
    """Draw the calibration windows of a model, and say so if they are of the default text."""
    windows = draw_text(text, tokenizer)
    if text.names == (DEFAULT_TEXT,):
        say_default()
    return windows


@cache  # a sweep draws for each of its models
def say_default() -> None:
    """Say once that the default text is calibrated on, and what does better."""
    log.info(
        "calibrating on %s, text of many kinds that comes with cfsp; text like what the model "
        "will read does better (--data)",
        DEFAULT_TEXT,
    )


def draw_text(text: CalibrationText, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Draw calibration windows evenly from each text, without overlap, by seed.

    The kinds of the mixed text are drawn from evenly too, each as a source of its own. What a text
    has too few windows for is drawn from the others; a long one is drawn from all over.
    """
    return _first_of(*_shuffled_pools(text, tokenizer))


def draw_left_over(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase, count: int
) -> Windows:
    """Draw `count` windows that `draw_text` does not draw, as evenly from each text as it has."""
    pools, drawn = _shuffled_pools(text, tokenizer)
    left = [pool.part(slice(share, None)) for pool, share in zip(pools, drawn, strict=True)]
    even = [share for _, share in parts_with_shares(text.names, count)]
    shares = shares_within(even, [len(windows.tokens_NT) for windows in left])
    if sum(shares) < count:
        raise TextError(
            f"{', '.join(map(name_of, text.names))}: of {sum(drawn) + sum(shares)} windows of "
            f"{text.seqlen} tokens calibration takes {sum(drawn)}; {count} others are needed to "
            "measure on: give fewer --samples, or more text"
        )
    return _first_of(left, shares)


def _first_of(pools: Sequence[Windows], shares: Sequence[int]) -> Windows:
    pairs = zip(pools, shares, strict=True)
    return joined([windows.part(slice(share)) for windows, share in pairs if share])


def _shuffled_pools(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Windows], list[int]]:
    """Return the windows of each text in the order in which they are drawn, and how many are."""
    begins_with, samples, seqlen = checked_beginning(text, tokenizer), text.samples, text.seqlen
    generator = torch.Generator().manual_seed(text.seed)
    pools: list[Windows] = []
    shares: list[int] = []
    for part, share in parts_with_shares(text.names, text.windows):
        source = TextSource(part, "calibration")
        stream_R = spread_tokens(source, tokenizer, text.windows * seqlen, text.seed)
        all_NT = gather(stream_R, spans(stream_R, seqlen, begins_with), seqlen, begins_with)
        order_N = torch.randperm(len(all_NT), generator=generator)
        pools.append(Windows(all_NT[order_N], {source.name: len(all_NT)}, begins_with))
        shares.append(share)
    return pools, _filled(pools, shares, samples)


def checked_beginning(text: CalibrationText, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what windows begin with; check that each text can give one that says something."""
    begins_with = beginning(tokenizer, text.bos)
    if text.windows < len(text.names) or text.seqlen < 2 + len(begins_with[1:]):
        raise UsageError(
            f"expected at least one window for each text and 2 tokens in a window, "
            f"found {text.windows} windows for {counted(len(text.names), 'texts')} and "
            f"{text.seqlen} tokens; give more --samples, fewer texts or a longer --seqlen"
        )
    return begins_with


def _filled(pools: Sequence[Windows], shares: Sequence[int], samples: int | None) -> list[int]:
    """Return shares of which none is larger than its pool; `samples` windows must be had in all."""
    found = shares_within(shares, [len(pool.tokens_NT) for pool in pools])
    enough = samples is None or sum(found) == samples
    for pool, share in zip(pools, shares, strict=True):
        (name,), (windows, seqlen) = pool.sources, pool.tokens_NT.shape
        if windows >= share:
            continue
        if not windows:
            raise TextError(
                f"{name} holds 0 windows of {seqlen} tokens: it is empty, or shorter than one; "
                "give more text or a shorter --seqlen"
            )
        if not enough:
            raise TextError(
                f"{name} holds {windows} windows of {seqlen} tokens, {share} are needed "
                f"({share * (seqlen - len(pool.begins_with))} tokens); give more text, fewer "
                "--samples or a shorter --seqlen"
            )
        if len(pools) > 1:
            _say_few(name, windows, seqlen, share)
    return found


@cache  # a run that measures on what is left over, or trains afterwards, draws several times
def _say_few(name: str, windows: int, seqlen: int, share: int) -> None:
    """Say once that a text has fewer windows than are drawn from each."""
    log.warning(
        "%s holds %d windows of %d tokens, fewer than its share of %d; what is missing is "
        "drawn from the other texts, as far as they have it",
        *(name, windows, seqlen, share),
    )


def shares_within(shares: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return shares of which none is larger than it can be: the others have more, evenly."""
    found = [min(pair) for pair in zip(shares, most, strict=True)]
    while (missing := sum(shares) - sum(found)) and (
        able := [i for i, share in enumerate(found) if share < most[i]]
    ):
        for i, more in zip(able, _shares(missing, len(able)), strict=True):
            found[i] = min(found[i] + more, most[i])
    return found


def parts_with_shares(texts: Sequence[str | Text], total: int) -> list[tuple[str | Text, int]]:
    """Return what windows are drawn from, kinds of the mixed text apart, and how many."""
    found: dict[object, tuple[str | Text, int]] = {}
    for text, share in zip(texts, _shares(total, len(texts)), strict=True):
        parts: Sequence[str | Text] = parts_of(text) if isinstance(text, str) else (text,)
        for part, more in zip(parts, _shares(share, len(parts)), strict=True):
            first, before = found.get(identity_of(part), (part, 0))
            found[identity_of(part)] = first, before + more
    return list(found.values())


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def consecutive_windows(
    text: str | Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int | None,
    seqlen: int,
    bos: Bos = "auto",
) -> Windows:
    """Return the first `count` windows of a text's evaluation part, or all of them for None.

    BOS counts as one of the tokens of a window.
    """
    begins_with = beginning(tokenizer, bos)
    if (count is not None and count < 1) or seqlen < 2 + len(begins_with[1:]):
        raise UsageError(
            f"expected at least 1 window of 2 tokens, found {count} windows of {seqlen} tokens"
        )
    source = TextSource(text, "evaluation")
    stream_R = first_tokens(source, tokenizer, math.inf if count is None else count * seqlen)
    whole = spans(stream_R, seqlen, begins_with, count)
    have, needed = len(whole), count or 1
    if have < needed:
        raise TextError(
            f"{source.name} holds {have} windows of {seqlen} tokens, {needed} are needed "
            f"({needed * (seqlen - len(begins_with))} tokens); give more text or fewer windows, "
            "or measure with cfsp eval and a shorter --seqlen"
        )
    return Windows(
        gather(stream_R, whole, seqlen, begins_with),
        {source.name: have},
        begins_with,
        evaluation_part=source.has_evaluation_part,
    )


# A text as a stream of tokens.


def first_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase, limit: float) -> Tensor:
    """Return the tokens that a text begins with, int64 [R]: all, or `limit` and few more."""
    found: list[Tensor] = []
    characters = int(min(_CHUNK_CHARACTERS, _CHARACTERS_OF_TOKEN * limit))
    for piece in _pieces(source, tokenizer, characters):
        found.append(_tokens([piece], tokenizer))
        if sum(map(len, found)) >= limit:
            break
    return torch.cat([_tokens([], tokenizer), *found])


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
    return _tokens(chunks, tokenizer)


def spread_documents(
    source: TextSource, most: float, seed: int
) -> list[tuple[int, str | Conversation]]:
    """Return documents of a text with their numbers, from all over it, in their order.

    Together they have `most` characters and few more, or they are all that there are; of
    conversations the answers count. What follows one another in a text without documents stays
    together. Of a data set on the hub, which may have no end, the beginning is taken.
    """
    random, together = Random(seed), _TOGETHER if source.is_in_pieces else 1
    kept: list[tuple[float, int, str | Conversation]] = []  # a heap, from which the first goes next
    place, total = 0.0, 0
    for number, document in enumerate(source.documents(), start=1):
        place = random.random() if number % together == 1 % together else place
        heappush(kept, (place, number, document))
        total += _counted_characters(document)
        if source.on_hub and total >= most:
            break
        while total - (least := _counted_characters(kept[0][2])) >= most:
            heappop(kept)
            total -= least
    return sorted(pair[1:] for pair in kept)


def _counted_characters(document: str | Conversation) -> int:
    if isinstance(document, str):
        return len(document)
    # One at least: a text without answers has an end too.
    return sum(len(each["content"]) for each in document if each["role"] == "assistant") or 1


def document_tokens(document: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of a document, int64 [R]."""
    return _tokens(_cut(document, _CHUNK_CHARACTERS), tokenizer)


def _tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of texts one after the other, each made tokens by itself, int64 [R]."""
    ids = (encoded(tokenizer, text)["input_ids"] for text in texts)
    none = torch.empty(0, dtype=torch.int64)
    return torch.cat([none, *(torch.tensor(each, dtype=torch.int64) for each in ids)])


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
    for document in source.texts(tokenizer):
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


def spans(
    stream_R: Tensor, seqlen: int, begins_with: Sequence[int] = (), count: int | None = None
) -> list[tuple[int, int]]:
    """Return the parts of a stream that windows have, one after the other, but for what is left.

    One that is shorter than a window has the beginning before it.
    """
    found: list[tuple[int, int]] = []
    begin, added = 0, len(begins_with)
    while count is None or len(found) < count:
        is_begun = stream_R[begin : begin + added].tolist() == list(begins_with)
        end = begin + seqlen - (0 if is_begun else added)
        if end > len(stream_R):
            break
        found.append((begin, end))
        begin = end
    return found


def gather(
    stream_R: Tensor,
    spans_N: Sequence[tuple[int, int]],
    seqlen: int,
    begins_with: Sequence[int] = (),
) -> Tensor:
    """Return the tokens of the windows [N, T], or what else the stream has of each token."""
    begin_P = torch.tensor(begins_with, dtype=stream_R.dtype)
    rows = [
        torch.cat([begin_P[: seqlen - (end - begin)], stream_R[begin:end]])
        for begin, end in spans_N
    ]
    return torch.stack(rows) if rows else stream_R.new_empty((0, seqlen))
