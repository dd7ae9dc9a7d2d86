"""The tokenizer of a model directory, and what it begins an input with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.errors import CheckpointError, UsageError, first_line
from cfsp.settings import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a model directory carries.

    Raises:
        CheckpointError: it carries none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers has no one exception type for this
        raise CheckpointError(
            f"{directory} carries no usable tokenizer ({first_line(error).rstrip(' :')}); copy the "
            "files of the model's own (tokenizer.json or tokenizer.model, and "
            "tokenizer_config.json) into it"
        ) from error
    return tokenizer


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> tuple[int, ...]:
    """Return the token ids that a window begins with: mostly BOS or none, for a few models two.

    Args:
        tokenizer: the model's own.
        bos: `auto` for what the tokenizer itself puts before a text; `yes` for BOS even where it
            puts nothing; `no` for nothing.

    Raises:
        UsageError: BOS is asked for, and the tokenizer has none.
    """
    if bos == "no":
        return ()
    before = _put_before_a_text(tokenizer)
    if before or bos == "auto":
        return before
    if not isinstance(tokenizer.bos_token_id, int):
        raise UsageError("--bos yes needs a tokenizer with a BOS token; this one has none")
    return (tokenizer.bos_token_id,)


def _put_before_a_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what a short text has before it once special tokens are added (not after it: EOS)."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()
