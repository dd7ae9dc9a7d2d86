"""What the Trainer saves of a run, and how far a saved run was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cfsp.engine.pass_state import PassState
from cfsp.recovery.schedule import Schedule

# The Trainer's own; it writes it last, so a readable one makes a checkpoint complete.
STATE_FILE = "trainer_state.json"
_PREFIX = "checkpoint-"
_ELAPSED = "elapsed_seconds"
_FRACTION = "fraction"


def progress_of(schedule: Schedule) -> dict[str, float]:
    """Return what an entry of the Trainer's log says of how far the run is."""
    return {_ELAPSED: round(schedule.elapsed, 3), _FRACTION: schedule.fraction}


def progress_in(log_history: Iterable[Mapping[str, float]]) -> tuple[float, float]:
    """Return seconds of work and the part of the run that is over, from the Trainer's log."""
    entries = [entry for entry in log_history if _ELAPSED in entry]
    return (
        max((entry[_ELAPSED] for entry in entries), default=0.0),
        max((entry[_FRACTION] for entry in entries), default=0.0),
    )


class SaveState(TrainerCallback):  # type: ignore[misc]
    """Notes in the work place that there is something to go on from.

    Args:
        state: of the training in the work place.
    """

    def __init__(self, state: PassState) -> None:
        self._state = state

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it: a checkpoint is complete now."""
        self._state.commit(state.global_step, None)


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint; a killed process may have left half of one."""
    numbered = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in directory.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit()
    ]
    newest_first = (path for _, path in sorted(numbered, reverse=True))
    return next((path for path in newest_first if _state(path) is not None), None)


def is_finished(checkpoint: Path) -> bool:
    """Return whether a complete checkpoint was saved after the last step of its run."""
    state = _state(checkpoint)
    assert state is not None, checkpoint
    return progress_in(state["log_history"])[1] >= 1


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state
