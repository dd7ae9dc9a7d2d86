"""The dense model as a teacher: in memory, or as its likeliest tokens on disk.

In memory its forward pass runs with every training step. On disk the pass over the training
windows is made once, before training; that pays from the second epoch on, and where the teacher
does not fit beside the model. Shapes: N windows, T tokens, V vocabulary, K tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cfsp.errors import RecoveryError
from cfsp.processes import is_first_on_machine
from cfsp.progress import item_progress
from cfsp.recovery.data import WindowData
from cfsp.recovery.loss import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKEN_FIELD = "teacher_token"
LOG_PROB_FIELD = "teacher_log_prob"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class TeacherChoice:
    """Which teacher, and how much it counts.

    Attributes:
        name: the dense model, as for prune.
        distillation: weight and temperature.
        top_k: store this many likeliest tokens on disk; None keeps the teacher in memory.
    """

    name: str
    distillation: Distillation = field(default_factory=Distillation)
    top_k: int | None = None


def check_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    label: str,
) -> None:
    """Check that teacher and model speak of the same tokens.

    Raises:
        RecoveryError: their vocabularies differ.
    """
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise RecoveryError(
            f"the tokenizer of the teacher {label} ({len(teacher_tokenizer)} tokens) is not that "
            f"of the model ({len(tokenizer)} tokens); the teacher must be the dense model that "
            "was pruned, or one with the same tokenizer"
        )
    sizes = int(model.config.vocab_size), int(teacher.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise RecoveryError(
            f"the teacher {label} predicts {sizes[1]} tokens, the model {sizes[0]}; the teacher "
            "must have the same vocabulary size"
        )


def store_top_tokens(
    teacher: PreTrainedModel, data: WindowData, directory: Path, top_k: int, temperature: float
) -> WindowData:
    """Return the windows with the teacher's likeliest tokens, made once and kept in a directory.

    The files are named after the windows, so an interrupted recovery finds them again, and they
    are read as they are needed. A token costs 6 bytes times `top_k`. Of several processes on a
    machine one makes them and the others wait; torchrun ends the wait if that one fails.

    Args:
        teacher: the dense model.
        data: training windows.
        directory: where the files go.
        top_k: tokens to keep.
        temperature: of the distillation; probabilities are stored at it.
    """
    stem = f"teacher-{data.digest[:16]}-{top_k}-{temperature}"
    paths = {name: directory / f"{stem}-{name}.npy" for name in (TOKEN_FIELD, LOG_PROB_FIELD)}
    if is_first_on_machine():
        if not _are_there(paths):
            directory.mkdir(parents=True, exist_ok=True)
            _store(teacher, data, paths, top_k, temperature)
    else:
        while not _are_there(paths):
            time.sleep(_POLL_SECONDS)
    return data.with_stored({name: np.load(path, mmap_mode="r") for name, path in paths.items()})


def _are_there(paths: dict[str, Path]) -> bool:
    return all(path.is_file() for path in paths.values())


def _store(
    teacher: PreTrainedModel,
    data: WindowData,
    paths: dict[str, Path],
    top_k: int,
    temperature: float,
) -> None:
    shape = (len(data), data.token_NT.shape[1] - 1, top_k)
    partial = {name: path.with_suffix(".partial") for name, path in paths.items()}
    tokens = np.lib.format.open_memmap(partial[TOKEN_FIELD], "w+", np.dtype(np.int32), shape)
    log_probs = np.lib.format.open_memmap(
        partial[LOG_PROB_FIELD], "w+", np.dtype(np.float16), shape
    )
    model: Any = teacher
    with torch.no_grad(), item_progress("teacher", len(data), "window") as bar:
        for index, token_T in enumerate(data.token_NT):
            logit_BTV = model(input_ids=token_T[None].to(teacher.device), use_cache=False).logits
            logit_TV = logit_BTV[0, :-1].float() / temperature
            top = logit_TV.topk(top_k, dim=1)
            log_prob_TK = top.values - logit_TV.logsumexp(1, keepdim=True)
            tokens[index] = top.indices.cpu().numpy()
            log_probs[index] = log_prob_TK.cpu().numpy()
            bar.update()
    tokens.flush()
    log_probs.flush()
    for name, path in paths.items():
        partial[name].rename(path)
