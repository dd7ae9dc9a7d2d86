"""What a killed pass resumes from: how far it came, and what entered the next block.

`state.json` is replaced in one step, after everything that it speaks of is on disk. It also
says what the work belongs to, so that other work never goes on from it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import ResumeError

STATE_FILE = "state.json"

# Saving may take this fraction of the time, so that it never slows a pass by more.
SHARE_OF_TIME = 0.02
# What the first save is expected to cost; later ones are measured.
_BYTES_PER_SECOND = 300e6
_LEAST_SECONDS = 0.01


class PassState:
    """The state of one pass, in a directory of its own.

    `identity` is everything that the results depend on, as JSON types; unfinished work of another
    is refused.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.directory, self._identity = directory, identity
        # The first block that is not finished.
        self.next_block = 0
        # Name of the file with the hidden states that enter it.
        self.hidden: str | None = None
        # What both were when the state was saved the time before. That file is there as long as no
        # state enters the next block.
        self.before: tuple[int, str | None] = (0, None)
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STATE_FILE).is_file():
            fields = read_state(directory / STATE_FILE, identity)
            self.next_block, self.hidden = fields["next_block"], fields["hidden"]
            self.before = tuple(fields.get("before", self.before))

    def commit(self, next_block: int, hidden: str | None) -> None:
        """Note that all before `next_block` is on disk."""
        self.before = self.next_block, self.hidden
        self.next_block, self.hidden = next_block, hidden
        self._write()

    def go_back_to(self, block: int) -> None:
        """Begin with `next_block`, that of `before`, or the first."""
        if block == self.next_block:
            return
        hidden = self.before[1] if block == self.before[0] else None
        self.next_block, self.hidden, self.before = block, hidden, (0, None)
        self._write()

    def _write(self) -> None:
        fields = {
            "identity": self._identity,
            "next_block": self.next_block,
            "hidden": self.hidden,
            "before": self.before,
        }
        write_atomically(
            self.directory / STATE_FILE, (json.dumps(fields, indent=2) + "\n").encode()
        )


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what WORK_DIR/PROCESS/PASS/state.json says, if it is whole and of an identity."""
    work_dir = path.parents[2]
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved: dict[str, Any] = fields["identity"]
        fields["next_block"] = int(fields["next_block"])
        _ = fields["hidden"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged; start over with: rm -r {work_dir}") from error
    for key, now in json.loads(json.dumps(identity)).items():
        if saved.get(key) != now:
            raise ResumeError(
                f"{work_dir} holds unfinished work with another {key} ({saved.get(key)}; now it is "
                f"{now}); repeat that command to finish it, or start over with: rm -r {work_dir}"
            )
    return fields


class Pace:
    """Decides when to save about so many bytes: as often as costs little."""

    def __init__(self, nbytes: int) -> None:
        self._cost = max(_LEAST_SECONDS, nbytes / _BYTES_PER_SECOND)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether enough time has passed since the last save."""
        return (time.monotonic() - self._last) * SHARE_OF_TIME >= self._cost

    def saved(self, seconds: float) -> None:
        """Note a save and what it took."""
        self._cost = max(_LEAST_SECONDS, seconds)
        self._last = time.monotonic()
