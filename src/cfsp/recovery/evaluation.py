"""Perplexity before and after a recovery, which pays for both from its minutes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.engine.pass_state import STATE_FILE, PassState
from cfsp.errors import UsageError
from cfsp.quality.evaluate import evaluate_models
from cfsp.settings import Compute, EvaluationText

logger = logging.getLogger(__name__)
# Of the minutes, for measuring before and after together; training is what they are for.
_SHARE_OF_MINUTES = 0.5
_FEW_WINDOWS = 4
_BASELINE_FILE = "perplexity.json"

Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Baseline:
    """Perplexity before training.

    Attributes:
        perplexity: text -> its value and the conditions under which it was measured.
        windows: how many of each text.
        seconds: that measuring took, and will take again after training.
    """

    perplexity: Perplexities
    windows: int
    seconds: float

    def save(self, path: Path) -> None:
        """Write it into a file."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def measure(directory: Path, texts: EvaluationText, compute: Compute) -> Perplexities:
    """Return text -> {"value", "tokens", "windows", "seqlen", "stride", "bos"} of a checkpoint."""
    (found,) = evaluate_models([directory], texts, compute)
    perplexity: Perplexities = found["perplexity"]
    return perplexity


def baseline_of(
    directory: Path,
    texts: EvaluationText,
    compute: Compute,
    seconds: float | None,
    state: PassState,
) -> Baseline:
    """Return the perplexity before training, which a killed run may have measured already.

    Args:
        directory: the pruned checkpoint.
        texts: what to measure on, with a number of windows.
        compute: how.
        seconds: of the whole recovery; None without a limit.
        state: of this measurement in the work place.
    """
    assert texts.windows is not None
    path = state.directory / _BASELINE_FILE
    if (state.directory / STATE_FILE).is_file():
        return Baseline.load(path)

    def measure_windows(count: int) -> Perplexities:
        return measure(directory, replace(texts, windows=count), compute)

    baseline = measure_before(measure_windows, texts.windows, seconds)
    baseline.save(path)
    state.commit(1, None)
    return baseline


def measure_before(
    measure_windows: Callable[[int], Perplexities],
    windows: int,
    seconds: float | None,
    now: Callable[[], float] = time.monotonic,
) -> Baseline:
    """Measure on as many windows as half of the time is enough for, before and after.

    Args:
        measure_windows: measures on so many windows of each text.
        windows: how many are wanted.
        seconds: of the whole recovery; None without a limit.
        now: a clock that never goes back.

    Raises:
        UsageError: not even one window of each text fits.
    """

    def timed(count: int) -> Baseline:
        begin = now()
        perplexity = measure_windows(count)
        return Baseline(perplexity, count, now() - begin)

    if seconds is None:
        return timed(windows)
    allowed = _SHARE_OF_MINUTES * seconds
    begin = now()
    found = timed(1)
    if 2 * found.seconds > allowed:
        raise UsageError(
            f"--eval takes {2 * found.seconds:.0f} s for one window of each text, before and after "
            f"training, more than half of --max-minutes {seconds / 60:g}; give --max-minutes "
            f"{math.ceil(2 * found.seconds / _SHARE_OF_MINUTES / 60)} or more, or no --eval"
        )
    # As if a window had taken all the time, and loading the model none of it.
    fit = _how_many(allowed - found.seconds, found.seconds)
    if 2 * _FEW_WINDOWS <= fit < windows:
        one, found = found, timed(_FEW_WINDOWS)
        a_window = max((found.seconds - one.seconds) / (_FEW_WINDOWS - 1), found.seconds / 8)
        loading = max(found.seconds - _FEW_WINDOWS * a_window, 0.0)
        fit = _how_many(allowed - (now() - begin), a_window, loading)
    if fit < windows and found.windows < windows:
        logger.warning(
            f"--eval measures on {max(fit, found.windows)} of {windows} windows of each text: more "
            f"would take over half of --max-minutes {seconds / 60:g}"
        )
    count = min(max(fit, found.windows), windows)
    return found if count == found.windows else timed(count)


def before_and_after(
    baseline: Baseline, directory: Path, texts: EvaluationText, compute: Compute
) -> Perplexities:
    """Measure what became of a model as it was measured before.

    Returns:
        text -> {"before", "after", "tokens", "windows", "seqlen", "stride", "bos"}.
    """
    after = measure(directory, replace(texts, windows=baseline.windows), compute)
    table: Perplexities = {}
    for text, before in baseline.perplexity.items():
        conditions = dict(before)
        value = conditions.pop("value")
        table[text] = {"before": value, "after": after[text]["value"], **conditions}
    return table


def _how_many(seconds: float, a_window: float, loading: float = 0.0) -> int:
    """Return how many windows can be measured twice in some time."""
    return int(max(seconds / 2 - loading, 0.0) / max(a_window, 1e-9))
