"""Token windows: equally long, never padded, the same for the same seed.

Shapes: N windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.errors import TextError, UsageError
from cfsp.text.sources import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 1024
_SEPARATOR = "\n\n"
_CHUNK_CHARACTERS = 4_000_000
# How much more text than needed windows are drawn from, where a source is that long.
_POOL_FACTOR = 16


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from.

    Attributes:
        tokens_NT: token ids, int64.
        sources: name of each source and how many windows it gave.
    """

    tokens_NT: Tensor
    sources: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 over the exact token ids and their shape, as hex."""
        digest = hashlib.sha256(str(tuple(self.tokens_NT.shape)).encode())
        digest.update(self.tokens_NT.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def few_windows(windows: Windows, count: int) -> Windows:
    """Return at most `count` windows, spread over all, so that every text has its share."""
    stride = max(1, len(windows.tokens_NT) // count)
    return replace(windows, tokens_NT=windows.tokens_NT[::stride][:count])


def draw_windows(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
) -> Windows:
    """Draw calibration windows evenly from each text, without overlap, by seed.

    Args:
        names: what to draw from; see `cfsp.text.sources`.
        tokenizer: the model's own.
        samples: windows in all; None for 128, or all that there are if that is less.
        seqlen: tokens in a window.
        seed: the same seed draws the same windows from the same text.

    Raises:
        TextError: a text is missing, or holds too few tokens for its share.
        UsageError: samples or seqlen is not positive.
    """
    drawn: list[Tensor] = []
    counts: dict[str, int] = {}
    for pool in _shuffled_pools(names, tokenizer, samples, seqlen, seed):
        drawn.append(pool.tokens_NT[: pool.share])
        counts[pool.name] = counts.get(pool.name, 0) + len(drawn[-1])
    return Windows(torch.cat(drawn), counts)


def draw_left_over(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seqlen: int,
    seed: int,
    count: int,
) -> Windows:
    """Draw windows that `draw_windows` with the same arguments does not draw.

    Args:
        names: as for `draw_windows`.
        tokenizer: the model's own.
        samples: as for `draw_windows`.
        seqlen: tokens in a window.
        seed: as for `draw_windows`.
        count: windows in all, as evenly from each text as possible.

    Raises:
        TextError: the texts have not so many windows left.
        UsageError: a text is named twice.
    """
    if len(set(names)) < len(names):
        raise UsageError(
            f"windows are left over of texts that are named once, found {', '.join(names)}; "
            "give a --held-out text"
        )
    drawn: list[Tensor] = []
    counts: dict[str, int] = {}
    shares = _shares(count, len(names))
    pools = _shuffled_pools(names, tokenizer, samples, seqlen, seed)
    for share, pool in zip(shares, pools, strict=True):
        left_NT = pool.tokens_NT[pool.share :]
        if len(left_NT) < share:
            raise TextError(
                f"{pool.name} holds {len(pool.tokens_NT)} windows of {seqlen} tokens, of which "
                f"calibration takes {min(pool.share, len(pool.tokens_NT))}; {share} others are "
                "needed to measure on: give fewer --samples, or a --held-out text"
            )
        drawn.append(left_NT[:share])
        counts[pool.name] = counts.get(pool.name, 0) + share
    return Windows(torch.cat(drawn), counts)


@dataclass(frozen=True)
class _ShuffledPool:
    """The windows of one text in the order in which they are drawn, and how many are."""

    name: str
    tokens_NT: Tensor
    share: int


def _shuffled_pools(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None,
    seqlen: int,
    seed: int,
) -> Iterator[_ShuffledPool]:
    if (samples is not None and samples < len(names)) or seqlen < 2:
        raise UsageError(
            f"expected at least one window for each text and 2 tokens in a window, "
            f"found {samples} windows for {len(names)} texts and {seqlen} tokens"
        )
    wanted = DEFAULT_SAMPLES if samples is None else samples
    generator = torch.Generator().manual_seed(seed)
    for name, share in zip(names, _shares(wanted, len(names)), strict=True):
        pool_NT = _pool(TextSource(name, "calibration"), tokenizer, seqlen, _POOL_FACTOR * share)
        have = pool_NT.shape[0]
        if have < share and (samples is not None or have == 0):
            raise TextError(
                f"{name} holds {have} windows of {seqlen} tokens, {share} are needed "
                f"({share * seqlen} tokens); give more text, fewer --samples or a shorter --seqlen"
            )
        yield _ShuffledPool(name, pool_NT[torch.randperm(have, generator=generator)], share)


def _shares(total: int, parts: int) -> list[int]:
    """Share a number out as evenly as possible."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def consecutive_windows(
    name: str, tokenizer: PreTrainedTokenizerBase, *, count: int | None, seqlen: int
) -> Windows:
    """Return the first `count` windows of a text's evaluation part (None: all).

    Raises:
        TextError: the text is missing or too short.
        UsageError: count or seqlen is not positive.
    """
    if (count is not None and count < 1) or seqlen < 2:
        raise UsageError(
            f"expected at least 1 window of 2 tokens, found {count} windows of {seqlen} tokens"
        )
    pool_NT = _pool(TextSource(name, "evaluation"), tokenizer, seqlen, count)
    have = pool_NT.shape[0]
    if have < (count or 1):
        raise TextError(
            f"{name} holds {have} windows of {seqlen} tokens, {count or 1} are needed "
            f"({(count or 1) * seqlen} tokens); give more text, fewer windows or a shorter --seqlen"
        )
    return Windows(pool_NT[:count], {name: min(have, count or have)})


def all_windows(
    name: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int, limit: int | None = None
) -> Tensor:
    """Return the calibration part of a text as consecutive windows, as int64 [N, T].

    Args:
        name: see `cfsp.text.sources`.
        tokenizer: the model's own.
        seqlen: tokens in a window.
        limit: about how many windows to read; None for the whole text.
    """
    return _pool(TextSource(name, "calibration"), tokenizer, seqlen, limit)[:limit]


def _pool(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None
) -> Tensor:
    """Return the text as consecutive windows, at least `limit` of them if it is that long."""
    pieces: list[Tensor] = []
    total = 0
    for chunk in _chunks(source.documents()):
        with warnings.catch_warnings():
            # "sequence longer than the model's maximum": it is cut into windows below.
            warnings.simplefilter("ignore")
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        total += len(ids)
        if limit is not None and total >= limit * seqlen:
            break
    if not pieces:
        return torch.empty((0, seqlen), dtype=torch.int64)
    whole = total // seqlen
    return torch.cat(pieces)[: whole * seqlen].view(whole, seqlen)


def _chunks(documents: Iterator[str]) -> Iterator[str]:
    """Join documents by an empty line, into strings of about 4 million characters."""
    held: list[str] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= _CHUNK_CHARACTERS:
            yield _SEPARATOR.join(held) + _SEPARATOR
            held, size = [], 0
    if held:
        yield _SEPARATOR.join(held)
