"""All that is checked, read and measured before a recovery loads a model.

Perplexity before and after is paid for from the minutes of a recovery.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.output import check_is_outside, check_output_is_free
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint, fingerprint
from cfsp.errors import UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.processes import process_count
from cfsp.quality.evaluate import evaluate_models, evaluation_windows
from cfsp.recovery.adaptation import BlockTargets, check_adapter_can_be_read, check_installed
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.settings import RecoverSettings
from cfsp.recovery.targets import targets_of
from cfsp.recovery.teacher import teacher_and_method
from cfsp.settings import Compute, EvaluationText
from cfsp.streaming.stopwatch import Stopwatch
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)
# Of the minutes, for measuring before and after together; training is what they are for.
_SHARE_OF_MINUTES = 0.5
_FEW_WINDOWS = 4

Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A recovery before a model is loaded."""

    source: Checkpoint  # the pruned model
    out: Path
    settings: RecoverSettings  # with a number of evaluation windows that every text holds
    watch: Stopwatch
    text: RecoveryText
    targets: list[BlockTargets]
    teacher: Checkpoint | None
    identity: dict[str, Any]  # what the result depends on, as JSON types


def prepare(source: Checkpoint, out: Path, settings: RecoverSettings) -> Prepared:
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
    check_installed(settings.adaptation.method)
    device = compute_device(settings.compute.device)
    check_texts(settings.data, settings.evaluation.names)
    if (plan := source.directory / PLAN_FILE).is_file():
        PruningPlan.load(plan)  # the card needs it: a damaged one is no surprise after training
    tokenizer = load_tokenizer(source.directory)
    teacher, method = teacher_and_method(settings, source, tokenizer, device)
    check_installed(method)
    settings = replace(settings, adaptation=replace(settings.adaptation, method=method))
    targets = targets_of(source, settings.adaptation)
    if training.shard and any(block.experts for block in targets):
        raise UsageError(
            "--shard cannot shard the adapters of experts; leave it out, or use --targets attention"
        )
    if settings.keep_adapter:
        check_adapter_can_be_read(source, targets)
    with watch.stage("text"):
        windows = evaluation_windows(settings.evaluation, source)
        text = read_text(settings.data, tokenizer, seqlen=training.seqlen, bos=training.bos)
    check_tokens(source.config, text.train.token_NT, source.label)
    if windows:
        count = min(len(of_text.tokens_NT) for of_text in windows.values())
        settings = replace(settings, evaluation=replace(settings.evaluation, windows=count))
    identity = {
        "command": "recover",
        "model": fingerprint(source),
        "text": text.train.digest,
        **asdict(settings.adaptation),
        **asdict(training.limit),
        **{name: value for name, value in asdict(training).items() if name != "limit"},
        "teacher": teacher and [teacher.label, asdict(settings.distillation)],
        "eval": {name: of_text.digest for name, of_text in windows.items()},
        "dtype": settings.compute.dtype,
    }
    if training.shard:  # any number of processes that makes the same steps reads its checkpoints
        identity |= {"windows in a step": training.windows_in_step, "batch_windows": 0}
    else:
        identity["processes"] = process_count()
    return Prepared(source, out, settings, watch, text, targets, teacher, identity)


@dataclass(frozen=True)
class Baseline:
    """Perplexity before training."""

    perplexity: Perplexities  # text -> its value and its conditions
    windows: int  # of each text
    seconds: float  # that measuring took, and will take again after training


def measure(directory: Path, texts: EvaluationText, compute: Compute, windows: int) -> Perplexities:
    """Return text -> {"value", "tokens", "windows", "seqlen", "bos"} of a checkpoint."""
    (found,) = evaluate_models([directory], replace(texts, windows=windows), compute)
    perplexity: Perplexities = found["perplexity"]
    return perplexity


def measure_before(
    measure_windows: Callable[[int], Perplexities],
    windows: int,
    seconds: float | None,
    now: Callable[[], float] = time.monotonic,
) -> Baseline:
    """Measure on as many windows as half of the time is enough for, before and after.

    That is of the `seconds` of the whole recovery; None without a limit.
    """

    def timed(count: int) -> Baseline:
        begin = now()
        perplexity = measure_windows(count)
        return Baseline(perplexity, count, now() - begin)

    if seconds is None:
        return timed(windows)
    allowed, begin = _SHARE_OF_MINUTES * seconds, now()
    found = timed(1)
    if 2 * found.seconds > allowed:
        raise UsageError(
            f"--eval takes {2 * found.seconds:.0f} s for one window of each text, before and after "
            f"training, more than half of --max-minutes {seconds / 60:g}; give --max-minutes "
            f"{math.ceil(2 * found.seconds / _SHARE_OF_MINUTES / 60)} or more, or no --eval"
        )
    # As if a window had taken all the time, and loading the model none of it.
    a_window, loading = found.seconds, 0.0

    def fit() -> int:
        left = (allowed - (now() - begin)) / 2
        return int(max(left - loading, 0.0) / max(a_window, 1e-9))

    if 2 * _FEW_WINDOWS <= fit() < windows:
        one, found = found, timed(_FEW_WINDOWS)
        a_window = max((found.seconds - one.seconds) / (_FEW_WINDOWS - 1), found.seconds / 8)
        loading = max(found.seconds - _FEW_WINDOWS * a_window, 0.0)
    count = min(max(fit(), found.windows), windows)
    if count < windows:
        logger.warning(
            f"--eval measures on {count} of {windows} windows of each text: more "
            f"would take over half of --max-minutes {seconds / 60:g}"
        )
    return found if count == found.windows else timed(count)
