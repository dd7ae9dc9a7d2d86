"""The dense model as a teacher: it lies in memory and runs with every training step."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import EARLIER, Checkpoint, fingerprint, parameter_count
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CheckpointError, RecoveryError, UnsupportedModelError
from cfsp.processes import process_count
from cfsp.recovery.settings import AUTO_TEACHER, NO_TEACHER, Method, RecoverSettings
from cfsp.result.manifest import read_manifest
from cfsp.streaming.runtime import free_bytes
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


# What training holds for each parameter: weights, gradients, AdamW's moments in float32. Adapters
# leave the weights in the model's dtype and have little else.
_BYTES_TO_TRAIN: dict[Method, int] = {"full": 16, "lora": 4}
_BYTES_OF_TEACHER = 4


def training_bytes(method: Method, parameters: int, parameters_of_teacher: int) -> int:
    """Return about what training with a teacher holds in memory."""
    return _BYTES_TO_TRAIN[method] * parameters + _BYTES_OF_TEACHER * parameters_of_teacher


def method_that_fits(parameters: int, of_teacher: int, device: torch.device) -> Method | None:
    """Return how a model of so many parameters can be trained with such a teacher.

    All projections in full where there is memory for that, which recovers more in the same time;
    else adapters. Not even those: None.
    """
    available = free_bytes(device)
    if training_bytes("full", parameters, of_teacher) <= available:
        return "full"
    fits = training_bytes("lora", parameters, of_teacher) <= available
    return "lora" if fits and importlib.util.find_spec("peft") is not None else None


def teacher_and_method(
    settings: RecoverSettings,
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[Checkpoint | None, Method]:
    """Return who teaches a pruned model, if anybody does, and how it is trained."""
    given, method = settings.teacher, settings.adaptation.method
    teacher, is_alone = None, process_count() == 1
    if given == AUTO_TEACHER:
        teacher = _recorded_teacher(source, tokenizer)
    elif given is not None and given != NO_TEACHER:
        teacher = open_checkpoint(given)
        check_teacher(source, tokenizer, teacher)
    counts = parameter_count(source), parameter_count(teacher) if teacher else 0
    if method == "auto":
        # Several processes must decide alike, and memory is not.
        is_open = settings.leaves_method_open and is_alone
        method = (is_open and method_that_fits(*counts, device)) or "lora"
    if given == AUTO_TEACHER and teacher is not None and is_alone:
        needed, available = training_bytes(method, *counts), free_bytes(device)
        if needed > available:
            _warn_of_no_teacher(
                teacher.label,
                f"with it training needs {needed / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB "
                "are available",
            )
            teacher = None
    return teacher, method


def _recorded_teacher(source: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Checkpoint | None:
    """Return the dense model that was pruned, if it is where the manifest says."""
    recorded = (read_manifest(source.directory) or {}).get("base_model")
    if not isinstance(recorded, dict):
        return None
    name = str(recorded.get("name", ""))
    try:
        teacher = open_checkpoint(name)
        if fingerprint(teacher) != recorded.get("fingerprint"):
            raise RecoveryError(f"what is there now is another model, {EARLIER} the manifest")
        check_teacher(source, tokenizer, teacher)
        return teacher
    except (CheckpointError, RecoveryError, UnsupportedModelError) as error:
        _warn_of_no_teacher(name, error)
        return None


def _warn_of_no_teacher(name: str, why: object) -> None:
    log.warning(
        "training on the text alone, which recovers less: the dense model %s cannot teach "
        "(%s); `cfsp recover` takes another with --teacher",
        name,
        why,
    )


def check_teacher(
    source: Checkpoint, tokenizer: PreTrainedTokenizerBase, teacher: Checkpoint
) -> None:
    """Check, from files alone, that teacher and model speak of the same tokens."""
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
