"""The tokenizer of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.errors import CheckpointError

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
            f"{directory} carries no usable tokenizer (tokenizer.json or tokenizer.model): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return tokenizer
