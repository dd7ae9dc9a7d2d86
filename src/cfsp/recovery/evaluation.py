"""Perplexity before and after a recovery, which pays for both from its minutes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfsp.errors import UsageError
from cfsp.quality.evaluate import evaluate_models
from cfsp.settings import Compute, EvaluationText

logger = logging.getLogger(__name__)
# Of the minutes, for measuring before and after together; training is what they are for.
_SHARE_OF_MINUTES = 0.5
_FEW_WINDOWS = 4

Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Baseline:
    """Perplexity before training."""

    perplexity: Perplexities  # text -> its value and its conditions
    windows: int  # of each text
    seconds: float  # that measuring took, and will take again after training


def measure(directory: Path, texts: EvaluationText, compute: Compute, windows: int) -> Perplexities:
    """Return text -> {"value", "tokens", "windows", "seqlen", "stride", "bos"} of a checkpoint."""
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
