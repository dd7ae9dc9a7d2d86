"""The dense model as a teacher: it lies in memory and runs with every training step."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import EARLIER, Checkpoint, fingerprint, parameter_count
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.engine.whole import free_bytes
from cfsp.errors import CheckpointError, RecoveryError, UnsupportedModelError
from cfsp.processes import process_count
from cfsp.recovery.memory import training_bytes
from cfsp.recovery.settings import AUTO_TEACHER, NO_TEACHER, Distillation, Method, TeacherChoice
from cfsp.result.manifest import read_manifest
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def choose_teacher(
    given: str | Path | None,
    source: Checkpoint,
    method: Method,
    distillation: Distillation,
    device: torch.device,
) -> TeacherChoice | None:
    """Return who teaches.

    Args:
        given: a model; `auto` for the dense model that was pruned, if it is still where its
            manifest says and one process has memory for both; `none` or None for nobody.
        source: the pruned model.
        method: how it will be trained.
        distillation: how much the teacher counts.
        device: where it will be trained.
    """
    if given is None or given == NO_TEACHER:
        return None
    if given != AUTO_TEACHER:
        return TeacherChoice(str(given), distillation)
    dense = _dense_model_of(source, method, device)
    return None if dense is None else TeacherChoice(dense, distillation)


def _dense_model_of(source: Checkpoint, method: Method, device: torch.device) -> str | None:
    """Return the name of the dense model that a model was pruned from; None if it is of no use."""
    recorded = (read_manifest(source.directory) or {}).get("base_model")
    if not isinstance(recorded, dict):
        return None
    name = str(recorded.get("name", ""))
    reason = ""
    try:
        dense = open_checkpoint(name)
        if fingerprint(dense) != recorded.get("fingerprint"):
            reason = f"what is there now is another model, {EARLIER} the manifest"
        else:
            check_teacher(source, load_tokenizer(source.directory), dense)
            # Several processes must decide alike, and memory is not.
            available = free_bytes(device) if process_count() == 1 else math.inf
            needed = training_bytes(method, parameter_count(source), parameter_count(dense))
            if needed > available:
                reason = (
                    f"with it training needs {needed / 1e9:.3g} GB of memory, "
                    f"{available / 1e9:.3g} GB are available"
                )
    except (CheckpointError, RecoveryError, UnsupportedModelError) as error:
        reason = str(error)
    if reason:
        log.warning(
            "training on the text alone, which recovers less: the dense model %s cannot teach "
            "(%s); `cfsp recover` takes another with --teacher",
            name,
            reason,
        )
        return None
    return name


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
