"""What is trained on and what is held out, as packed windows.

All of every text is used. Of each, and of each kind of the mixed text, some documents are held out
that are spread over it (`cfsp.text.hold_out`): nothing of them is trained on. Of a document that is
much longer than what is held out, it is a part. The order is the Trainer's, by seed.

Shapes: N windows, T tokens of a window, R tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfsp.errors import TextError
from cfsp.recovery.chat import chat_tokens
from cfsp.recovery.loss import IGNORED
from cfsp.settings import Bos, Text
from cfsp.text.cutting import gather, spans
from cfsp.text.hold_out import held_out_documents
from cfsp.text.pools import distinct_parts
from cfsp.text.sources import TextSource
from cfsp.text.stream import document_tokens
from cfsp.text.tokenizers import beginning
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A hub data set may have no end: this many tokens of one text are enough for any recovery.
_MAX_TOKENS_OF_A_TEXT = 200_000_000
_HELD_OUT_SHARE = 0.03
_MAX_HELD_OUT_TOKENS = 16_384
_MOST_OF_A_DOCUMENT = 4096

# Token ids and labels.
_Tokens = tuple[Tensor, Tensor]


class WindowData(Dataset[dict[str, Tensor]]):
    """Windows with labels.

    Args:
        token_NT: token ids.
        label_NT: token ids where they count, `IGNORED` elsewhere and at the first position,
            which nothing predicts.
    """

    def __init__(self, token_NT: Tensor, label_NT: Tensor) -> None:
        assert token_NT.shape == label_NT.shape
        self.token_NT = token_NT
        self.label_NT = label_NT.clone()
        # Then every count of labels, shifted or not, is the count of predictions.
        self.label_NT[:, 0] = IGNORED

    def __len__(self) -> int:
        return len(self.token_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.token_NT[index], "labels": self.label_NT[index]}

    @property
    def digest(self) -> str:
        """SHA-256 over the exact token ids."""
        return Windows(self.token_NT, {}).digest


@dataclass(frozen=True)
class RecoveryText:
    """Training windows, held-out windows, and how many training windows each text gave.

    Attributes:
        bos: whether every window begins with BOS.
    """

    train: WindowData
    held_out: WindowData
    sources: dict[str, int]
    bos: bool


def read_text(
    names: Sequence[str | Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    bos: Bos = "auto",
) -> RecoveryText:
    """Read texts and conversations and hold out some documents of each.

    Args:
        names: see `cfsp.text.sources`.
        tokenizer: the model's own.
        seqlen: tokens in a window, BOS included.
        bos: whether windows begin with BOS; see `cfsp.text.tokenizers.beginning`.

    Raises:
        TextError: there is no text, or one is missing or shorter than two windows.
    """
    if not names:
        raise TextError("recovery needs text to train on; give --data")
    begins_with = beginning(tokenizer, bos)
    train: list[_Tokens] = []
    held_out: list[_Tokens] = []
    sources: dict[str, int] = {}
    for part in distinct_parts(names):
        source = TextSource(part, "calibration")
        documents = list(_documents(source, tokenizer))
        own, held = (_windows(each, seqlen, begins_with) for each in _divided(documents, seqlen))
        if not len(own[0]) or not len(held[0]):  # too little text, or held out without an answer
            token_NT, label_NT = _windows(documents, seqlen, begins_with)
            own, held = (token_NT[:-1], label_NT[:-1]), (token_NT[-1:], label_NT[-1:])
        if not len(own[0]):
            raise TextError(
                f"{source.name} holds {len(held[0])} windows of {seqlen} tokens to learn from, 2 "
                "are needed: one to train on and one to hold out; give more text or a shorter "
                "--seqlen"
            )
        train.append(own)
        held_out.append(held)
        sources[source.name] = sources.get(source.name, 0) + len(own[0])
    return RecoveryText(_joined(train), _joined(held_out), sources, bool(begins_with))


def _documents(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    """Yield the tokens and the labels of each document, until there are enough."""
    total = 0
    if source.is_chat:
        documents = chat_tokens(source.conversations(), tokenizer)
    else:
        documents = ((token_R, token_R) for token_R in document_tokens(source, tokenizer))
    for document in documents:
        yield document
        total += len(document[0])
        if total >= _MAX_TOKENS_OF_A_TEXT:
            return


def _divided(documents: Sequence[_Tokens], seqlen: int) -> tuple[list[_Tokens], list[_Tokens]]:
    """Return the documents that are trained on, and those that are held out."""
    share = round(_HELD_OUT_SHARE * sum(len(token_R) for token_R, _ in documents))
    longest = max(seqlen, min(2 * share, _MOST_OF_A_DOCUMENT))
    pieces = [
        (token_R[max(0, end - longest) : end], label_R[max(0, end - longest) : end])
        for token_R, label_R in documents
        for end in reversed(range(len(token_R), 0, -longest))
    ]
    sizes = [len(token_R) for token_R, _ in pieces]
    held_N = held_out_documents(sizes, max(seqlen, min(share, _MAX_HELD_OUT_TOKENS)))
    divided: tuple[list[_Tokens], list[_Tokens]] = [], []
    for piece, held in zip(pieces, held_N, strict=True):
        divided[held].append(piece)
    return divided


def _windows(documents: Sequence[_Tokens], seqlen: int, begins_with: tuple[int, ...]) -> _Tokens:
    """Return documents one after another, cut into windows, and their labels.

    What a window begins with is no label. Windows without any label are left out.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    token_R = torch.cat([nothing, *(token_R for token_R, _ in documents)])
    label_R = torch.cat([nothing, *(label_R for _, label_R in documents)])
    cut = spans(token_R, seqlen, begins_with)
    token_NT = gather(token_R, cut, seqlen, begins_with)
    label_NT = gather(label_R, cut, seqlen, [IGNORED] * len(begins_with))
    useful_N = (label_NT[:, 1:] != IGNORED).any(dim=1)
    return token_NT[useful_N], label_NT[useful_N]


def _joined(parts: Sequence[_Tokens]) -> WindowData:
    return WindowData(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
