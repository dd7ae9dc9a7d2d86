"""What is trained on and what is held out, as packed windows.

All windows of every text are used; the last ones of each are held out, so that no window that is
measured on lies between windows that are trained on. The order is the Trainer's, by seed.

Shapes: N windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfsp.errors import TextError
from cfsp.recovery.chat import chat_windows
from cfsp.recovery.loss import IGNORED
from cfsp.settings import Bos, Text
from cfsp.text.drawing import all_windows
from cfsp.text.sources import TextSource, name_of
from cfsp.text.tokenizers import beginning
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A hub data set may have no end: this many tokens of one text are enough for any recovery.
_MAX_TOKENS_OF_A_TEXT = 200_000_000
_HELD_OUT_SHARE = 0.03
_MAX_HELD_OUT_TOKENS = 16_384


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
    """Read texts and conversations and hold out the end of each.

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
    train: list[tuple[Tensor, Tensor]] = []
    held_out: list[tuple[Tensor, Tensor]] = []
    sources: dict[str, int] = {}
    for name in names:
        token_NT, label_NT = _windows(name, tokenizer, seqlen, bos)
        have = len(token_NT)
        if have < 2:
            raise TextError(
                f"{name_of(name)} holds {have} windows of {seqlen} tokens to learn from, 2 are "
                "needed: one to train on and one to hold out; give more text or a shorter --seqlen"
            )
        held = min(round(have * _HELD_OUT_SHARE), _MAX_HELD_OUT_TOKENS // seqlen)
        cut = have - max(1, held)
        train.append((token_NT[:cut], label_NT[:cut]))
        held_out.append((token_NT[cut:], label_NT[cut:]))
        sources[name_of(name)] = sources.get(name_of(name), 0) + cut
    begins_with_bos = bool(beginning(tokenizer, bos))
    return RecoveryText(_joined(train), _joined(held_out), sources, begins_with_bos)


def _windows(
    name: str | Text, tokenizer: PreTrainedTokenizerBase, seqlen: int, bos: Bos
) -> tuple[Tensor, Tensor]:
    limit = _MAX_TOKENS_OF_A_TEXT // seqlen
    source = TextSource(name, "calibration")
    if source.is_chat:
        return chat_windows(
            source.conversations(),
            tokenizer,
            seqlen=seqlen,
            limit=limit,
            begins_with=beginning(tokenizer, bos),
        )
    token_NT = all_windows(name, tokenizer, seqlen=seqlen, limit=limit, bos=bos).tokens_NT
    return token_NT, token_NT


def _joined(parts: list[tuple[Tensor, Tensor]]) -> WindowData:
    return WindowData(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
