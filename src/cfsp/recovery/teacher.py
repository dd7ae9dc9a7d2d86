"""The dense model as a teacher: it lies in memory and runs with every training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import RecoveryError
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_teacher(
    source: Checkpoint, tokenizer: PreTrainedTokenizerBase, teacher: Checkpoint
) -> None:
    """Check, from files alone, that teacher and model speak of the same tokens.

    Args:
        source: the pruned model.
        tokenizer: its own.
        teacher: the dense model.

    Raises:
        CheckpointError: the teacher carries no tokenizer.
        RecoveryError: their vocabularies differ.
    """
    found = load_tokenizer(teacher.directory)
    if tokenizer.get_vocab() != found.get_vocab():
        raise RecoveryError(
            f"the tokenizer of the teacher {teacher.label} ({len(found)} tokens) is not that "
            f"of the model ({len(tokenizer)} tokens); the teacher must be the dense model that "
            "was pruned, or one with the same tokenizer"
        )
    sizes = vocabulary_of(source.config), vocabulary_of(teacher.config)
    if sizes[0] != sizes[1]:
        raise RecoveryError(
            f"the teacher {teacher.label} predicts {sizes[1]} tokens, the model {sizes[0]}; the "
            "teacher must have the same vocabulary size"
        )
