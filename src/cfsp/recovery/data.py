"""What is trained on and what is held out, as packed windows.

All of every text is used, unless it is more than the steps or minutes of a run come to, or has no
end: then enough of it for them. Of each, and of each kind of the mixed text, some documents are
held out that are spread over it (`cfsp.text.windows`): nothing of them is trained on. Of a document
that is much longer than what is held out, it is a part. The order is the Trainer's, by seed.

Of conversations only the answers are trained on. Chat templates mark none: an answer is what a
longer conversation adds, the template of the messages up to it minus what it has in common with
that of those before it with the prompt for an answer. One that the template shows otherwise once
others follow, as Qwen3's leaves out what was thought before it, is none that a model gives, and is
not trained on. Tokens are made from the whole text at once, and belong to an answer by their
offsets.

Shapes: N windows, T tokens of a window, R tokens of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cfsp.errors import TextError
from cfsp.progress import item_progress
from cfsp.recovery.loss import IGNORED
from cfsp.recovery.settings import MOST_TOKENS
from cfsp.settings import Bos, Text
from cfsp.text.drawing import (
    document_tokens,
    gather,
    parts_with_shares,
    spans,
    spread_documents,
)
from cfsp.text.records import Conversation, check_has_template, templated
from cfsp.text.sources import TextSource
from cfsp.text.tokenizers import beginning, encoded
from cfsp.text.windows import Windows, held_out_documents

# One pass over a data set on the hub, which may have no end, is one over so many tokens of it.
_PASS_OVER_A_HUB_TEXT = 1_000_000
_USUAL_CHARACTERS = 6  # of a token: text in most languages has fewer
_HELD_OUT_SHARE = 0.03
_MAX_HELD_OUT_TOKENS = 16_384
_MOST_OF_A_DOCUMENT = 4096
# What a report calls the chats that the dense model writes, and which part of a pass they are.
OWN_CHATS = "the dense model's chats"
_SHARE_OF_CHATS = 0.25


class WindowData(Dataset[dict[str, Tensor]]):
    """Windows with labels: token ids where they count, `IGNORED` elsewhere."""

    def __init__(self, token_NT: Tensor, label_NT: Tensor) -> None:
        assert token_NT.shape == label_NT.shape
        self.token_NT = token_NT
        self.label_NT = label_NT.clone()
        # Nothing predicts the first one: every count of labels is then the count of predictions.
        self.label_NT[:, 0] = IGNORED

    def __len__(self) -> int:
        return len(self.token_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.token_NT[index], "labels": self.label_NT[index]}

    def and_windows(self, windows_2NT: Tensor) -> WindowData:
        """Return the same with further windows, and their labels."""
        token_NT, label_NT = windows_2NT
        return WindowData(
            torch.cat([self.token_NT, token_NT]), torch.cat([self.label_NT, label_NT])
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the exact token ids and labels."""
        return Windows(torch.cat([self.token_NT, self.label_NT], dim=1), {}).digest


@dataclass(frozen=True)
class RecoveryText:
    """Training and held-out windows, how many for training each text gave, whether all have BOS."""

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
    most: float = math.inf,
    seed: int = 0,
) -> RecoveryText:
    """Read texts and conversations, about `most` tokens of each; hold out some documents of each.

    Of a local text that has more they are from all over it, by seed.
    """
    if not names:
        raise TextError("recovery needs text to train on; give --data")
    begins_with = beginning(tokenizer, bos)
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    sources: dict[str, int] = {}
    for part, _ in parts_with_shares(names, 0):
        source = TextSource(part, "calibration")
        documents = list(_documents(source, tokenizer, most, seed))
        own, held = _own_and_held_out(documents, seqlen, begins_with)
        if not (count := own.shape[1]):
            raise TextError(
                f"{source.name} holds {held.shape[1]} windows of {seqlen} tokens to learn from, 2 "
                "are needed: one to train on and one to hold out; give more text, of "
                "conversations more answers, or a shorter --seqlen"
            )
        train.append(own)
        held_out.append(held)
        sources[source.name] = sources.get(source.name, 0) + count
    to_train, to_judge = (WindowData(*torch.cat(parts, dim=1)) for parts in (train, held_out))
    return RecoveryText(to_train, to_judge, sources, bool(begins_with))


def with_chats(
    text: RecoveryText,
    chats: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    bos: Bos = "auto",
) -> RecoveryText:
    """Return a text with the dense model's chats, repeated or cut to be a part of a pass."""
    documents = [answer_tokens(chat, tokenizer, number) for number, chat in enumerate(chats, 1)]
    seqlen = text.train.token_NT.shape[1]
    own, held = _own_and_held_out(documents, seqlen, beginning(tokenizer, bos))
    if not own.shape[1]:
        return text
    others = _SHARE_OF_CHATS / (1 - _SHARE_OF_CHATS) * len(text.train)
    # Of a short text, fewer of them: it is what was asked to be learnt.
    own = own[:, : max(1, round(others))]
    own = own.repeat(1, max(1, round(others / own.shape[1])), 1)
    return replace(
        text,
        train=text.train.and_windows(own),
        held_out=text.held_out.and_windows(held),
        sources=text.sources | {OWN_CHATS: own.shape[1]},
    )


def _own_and_held_out(
    documents: Sequence[Tensor], seqlen: int, begins_with: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the windows [2, N, T] of documents to train on, and those that are held out."""
    own, held = (_windows(each, seqlen, begins_with) for each in _divided(documents, seqlen))
    if not own.shape[1] or not held.shape[1]:  # too little text, or held out without an answer
        whole = _windows(documents, seqlen, begins_with)
        own, held = whole[:, :-1], whole[:, -1:]
    return own, held


def _documents(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, most: float, seed: int
) -> Iterator[Tensor]:
    """Yield the tokens and the labels of each document as [2, R]."""
    if source.on_hub:
        most = _PASS_OVER_A_HUB_TEXT if most == math.inf else min(most, MOST_TOKENS)
    if source.is_chat:
        check_has_template(tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise TextError(
                f"the model's tokenizer ({type(tokenizer).__name__}) does not say which characters "
                "a token is of, so answers cannot be told from the rest; give plain text"
            )
    documents = spread_documents(source, _USUAL_CHARACTERS * most, seed)
    with item_progress(f"reading {source.name}", len(documents), "document") as bar:
        for number, document in documents:
            if isinstance(document, str):
                yield document_tokens(document + source.separator, tokenizer).expand(2, -1)
            else:
                yield answer_tokens(document, tokenizer, number)
            bar.update()


def _divided(documents: Sequence[Tensor], seqlen: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the documents that are trained on, and those that are held out."""
    share = round(_HELD_OUT_SHARE * sum(document.shape[1] for document in documents))
    longest = max(seqlen, min(2 * share, _MOST_OF_A_DOCUMENT))
    pieces = [
        document[:, max(0, end - longest) : end]
        for document in documents
        for end in reversed(range(document.shape[1], 0, -longest))
    ]
    sizes = [piece.shape[1] for piece in pieces]
    held_N = held_out_documents(sizes, max(seqlen, min(share, _MAX_HELD_OUT_TOKENS)))
    divided: tuple[list[Tensor], list[Tensor]] = [], []
    for piece, held in zip(pieces, held_N, strict=True):
        divided[held].append(piece)
    return divided


def _windows(documents: Sequence[Tensor], seqlen: int, begins_with: tuple[int, ...]) -> Tensor:
    """Return documents one after another, cut into windows, and their labels: [2, N, T].

    What a window begins with is no label. Windows without any label are left out.
    """
    token_R, label_R = torch.cat([torch.empty(2, 0, dtype=torch.int64), *documents], dim=1)
    cut = spans(token_R, seqlen, begins_with)
    token_NT = gather(token_R, cut, seqlen, begins_with)
    label_NT = gather(label_R, cut, seqlen, [IGNORED] * len(begins_with))
    useful_N = (label_NT[:, 1:] != IGNORED).any(dim=1)
    return torch.stack([token_NT, label_NT])[:, useful_N]


def answer_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, number: int = 1
) -> Tensor:
    """Return the tokens and labels of a conversation as [2, R]: only answers have labels."""
    answers: list[tuple[int, int]] = []
    whole = templated(conversation, tokenizer, number)
    # What opens a conversation answers nothing.
    places = [i for i, message in enumerate(conversation) if i and message["role"] == "assistant"]
    for index in places:
        earlier = templated(conversation[:index], tokenizer, number)
        asked = templated(conversation[:index], tokenizer, number, add_generation_prompt=True)
        after = templated(conversation[: index + 1], tokenizer, number)
        # DeepSeek-R1's prompt opens the thoughts, of which the answer then has none.
        start = sum(takewhile(bool, map(eq, asked, after)))
        if whole.startswith(after) and start >= min(len(earlier), len(asked)):
            answers.append((start, len(after)))
    if not answers and len(conversation) - 1 in places:  # of the last one nothing follows
        raise TextError(
            f"conversation {number}: the chat template changes earlier messages when "
            "later ones follow, so answers cannot be told from the rest"
        )
    found = encoded(tokenizer, whole, return_offsets_mapping=True)
    token_R = torch.tensor(found["input_ids"], dtype=torch.int64)
    # A token that begins with the space before an answer belongs to the answer.
    answer_R = torch.tensor(
        [
            any(max(start, a) < min(stop, b) for a, b in answers)
            for start, stop in found["offset_mapping"]
        ],
        dtype=torch.bool,
    )
    return torch.stack([token_R, token_R.where(answer_R, IGNORED)])
