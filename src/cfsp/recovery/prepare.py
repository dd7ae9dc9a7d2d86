"""All that is checked and read before a recovery loads a model, and who teaches it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cfsp.calibration.calibrate import check_length, check_tokens
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.locating import exists, open_checkpoint, path_of
from cfsp.checkpoint.output import check_is_outside, check_output_is_free
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.errors import (
    CheckpointError,
    RecoveryError,
    ResumeError,
    UnsupportedModelError,
    UsageError,
)
from cfsp.processes import process_count
from cfsp.quality.evaluate import evaluation_windows
from cfsp.recovery.adaptation import ranks_of, trained_parameters, training_dtype
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.settings import AUTO_TEACHER, NO_TEACHER, RecoverSettings
from cfsp.result.card import model_card, origin_of
from cfsp.result.manifest import facts_about, plan_beside, refusing_damage
from cfsp.settings import by_flag
from cfsp.streaming.runtime import free_bytes, runtime_identity, runtime_of
from cfsp.streaming.work_dir import STATE_FILE, Stopwatch, directory_of_process, read_state
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows, digests_of

logger = logging.getLogger(__name__)
# Weights that are trained themselves, gradients and AdamW's moments, in float32.
_BYTES_TO_TRAIN = 16
# What waits in a step for the way back, of each token in each block: so many values for each of the
# hidden state and of the FFN channels. Routed experts see a token a few at a time. Fitted to the
# peaks of docs/RESULTS.md, as is what is held besides.
_OF_HIDDEN, _OF_CHANNEL, _EXPERTS = 14.0, 5.5, 8
_BESIDE = 1e9


@dataclass(frozen=True)
class Prepared:
    """A recovery before a model is loaded."""

    source: Checkpoint  # the pruned model
    out: Path
    settings: RecoverSettings
    watch: Stopwatch
    text: RecoveryText
    windows: dict[str, Windows]  # to measure perplexity on, before and after
    trained: list[str]  # the parameters that change
    rank_L: list[int | None]  # of the adapters of each block; None in full training
    teacher: Checkpoint | None
    identity: dict[str, Any]  # what the result depends on, as JSON types
    started: float  # when its minutes began, in seconds of `time.monotonic()`

    def at_rate(self, rate: float) -> Prepared:
        """Return the same with a learning rate."""
        training = replace(self.settings.training, learning_rate=rate)
        return replace(self, settings=replace(self.settings, training=training))


def prepare(source: Checkpoint, out: Path, settings: RecoverSettings, started: float) -> Prepared:
    """Check all that a user can get wrong, the cheap first, and read the texts."""
    training, watch = settings.training, Stopwatch()
    check_is_outside(out, source.directory)
    check_output_is_free(out)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # It would write a part of the weights as if it were all.
        raise UsageError(
            "recovery does not run under accelerate's FSDP; start it with torchrun, or accelerate "
            "launch without FSDP, and give --shard if memory is short"
        )
    check_length(source.config, training.seqlen, source.label)
    compute_device(settings.compute.device)  # it is there
    with refusing_damage(source.directory):  # its card can be made, so it can after training
        model_card(facts_about(source), plan_beside(source.directory), origin_of(source))
    tokenizer = load_tokenizer(source.directory)
    # A teacher that is given counts by its files, whatever it is called.
    is_named = settings.teacher not in (AUTO_TEACHER, NO_TEACHER)
    asked = {
        "--method": settings.adaptation.method,
        "--teacher": "a model" if is_named else settings.teacher,
    }
    teacher = teacher_of(settings, source, tokenizer, _was_taught(out, asked))
    if process_count() == 1 and (why := lack_of_memory(source, teacher, settings)):
        logger.warning("%s: it may be killed", why)
    rank_L = ranks_of(source, settings.adaptation)
    trained = trained_parameters(source, is_full=settings.adaptation.method == "full")
    with watch.stage("text"):
        windows = evaluation_windows(settings.evaluation, source)
        text = read_text(
            settings.data,
            tokenizer,
            seqlen=training.seqlen,
            bos=training.bos,
            most=training.most_tokens(len(settings.data)),
            seed=training.seed,
        )
    for part in (text.train, text.held_out):
        check_tokens(source.config, part.token_NT, source.label)
    identity = {
        "command": "recover",
        **asked,
        "model": source.identity,
        **by_flag(settings.adaptation),
        **by_flag(training.limit),
        **{name: v for name, v in by_flag(training).items() if name != "limit"},
        "text": [text.train.digest, text.held_out.digest],
        "teacher": teacher and teacher.identity,
        "eval": digests_of(windows),
        **runtime_identity(runtime_of(settings.compute, source)),
    }
    if training.shard:  # any number of processes that makes the same steps reads its checkpoints
        identity |= {"windows in a step": training.windows_in_step, "--batch-windows": 0}
    else:
        identity["number of processes"] = process_count()
    return Prepared(
        source=source,
        out=out,
        settings=settings,
        watch=watch,
        text=text,
        windows=windows,
        trained=trained,
        rank_L=rank_L,
        teacher=teacher,
        identity=identity,
        started=started,
    )


def training_bytes(
    source: Checkpoint, teacher: Checkpoint | None, settings: RecoverSettings, device: torch.device
) -> float:
    """Return about what training holds in memory: weights, what trains them, and a step."""
    item = training_dtype(source, device, settings.compute.dtype).itemsize
    models = [source] if teacher is None else [source, teacher]
    weights = float(item * sum(each.parameter_count for each in models))
    if settings.adaptation.method == "full":
        weights += (_BYTES_TO_TRAIN - item) * sum(parameters_of_blocks(source))
    training, hidden = settings.training, int(text_config_of(source.config).hidden_size)
    blocks = source.architecture.block_count
    channels = sum(
        unit.width * (_EXPERTS if unit.routed else 1)
        for unit in source.architecture.of_part("ffn").units
    )
    kept = _OF_HIDDEN * hidden * blocks + _OF_CHANNEL * channels
    if training.gradient_checkpointing:  # one block at a time, and what enters each
        kept = kept / blocks + hidden * blocks
    return weights + item * training.batch_windows * training.seqlen * kept + _BESIDE


def lack_of_memory(
    source: Checkpoint, teacher: Checkpoint | None, settings: RecoverSettings
) -> str:
    """Return in words that training takes more memory than there is; nothing if it does not."""
    device = compute_device(settings.compute.device)
    needed, available = training_bytes(source, teacher, settings, device), free_bytes(device)
    if needed <= available:
        return ""
    taught = "" if teacher is None else f" beside {teacher.label}"
    return (
        f"training{taught} takes about {needed / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB "
        "are available (--gradient-checkpointing, --batch-windows 1 and a short --seqlen take less)"
    )


def teacher_of(
    settings: RecoverSettings,
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    was_taught: bool | None,
) -> Checkpoint | None:
    """Return who teaches a pruned model, if anybody does.

    What memory decides stays as a killed run had it, which `was_taught` or was not.
    """
    given = settings.teacher
    if given == NO_TEACHER:
        return None
    if given != AUTO_TEACHER:
        teacher = open_checkpoint(given)
        check_teacher(source, tokenizer, teacher)
        return teacher
    recorded = _recorded_teacher(source, tokenizer)
    if recorded is None or was_taught is not None:
        return recorded if was_taught else None
    # Several processes must decide alike, and memory is not.
    if process_count() == 1 and (why := lack_of_memory(source, recorded, settings)):
        _warn_of_no_teacher(recorded.label, why)
        return None
    return recorded


def _was_taught(out: Path, asked: Mapping[str, str]) -> bool | None:
    """Return whether a killed run into the same place had a teacher; None if there is none."""
    for state in sorted(directory_of_process(out).glob(f"*/{STATE_FILE}")):
        with suppress(ResumeError):  # it is told of where that work is taken up
            identity = read_state(state, {"command": "recover", **asked})["identity"]
            return identity["teacher"] is not None
    return None


def _recorded_teacher(source: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Checkpoint | None:
    """Return the dense model that was pruned, if it is where the manifest says.

    Of one that was pruned several times it is the first, else the next that is there.
    """
    before, recorded = facts_about(source).get("base_model"), []
    if before is None:
        logger.warning(
            f"training on the text alone, because nothing says what {source.label} was pruned "
            "from: give the dense model to --teacher, or none"
        )
    failed: tuple[str, Exception] | None = None
    while isinstance(before, dict):
        recorded.append(before)
        before = before.get("made_from")
    places = [
        (place, each.get("fingerprint"))
        for each in reversed(recorded)
        for place in _places_of(str(each.get("name", "")), source.directory)
    ]
    for name, fingerprint in places:
        try:
            teacher = open_checkpoint(name)
            if teacher.fingerprint != fingerprint:
                raise RecoveryError("what is there now is another model")
            check_teacher(source, tokenizer, teacher)
            return teacher
        except (CheckpointError, RecoveryError, UnsupportedModelError) as error:
            failed = failed or (name, error)
    if failed is not None:
        _warn_of_no_teacher(*failed)
    return None


def _places_of(name: str, made: Path) -> list[str]:
    """Return where a model may be: here, in a directory above what was made of it, on the hub.

    Its name may be a path that was typed in another directory.
    """
    above = [str(parent / name) for parent in made.absolute().parents if exists(parent / name)]
    places = [name, *above] if exists(path_of(name)) else [*above, name]
    return list(dict.fromkeys(places))  # an absolute path is one place


def _warn_of_no_teacher(name: str, why: object) -> None:
    logger.warning(
        f"training on the text alone, which recovers less: the dense model {name} cannot teach "
        f"({why}); `cfsp recover` takes another with --teacher"
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
