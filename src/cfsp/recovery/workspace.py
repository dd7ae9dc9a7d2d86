"""The work directory of a recovery: the Trainer's checkpoints and the settings they belong to.

It lies beside the output, is deleted when the output is written, and stays after a kill or a
diverged loss, so that `--resume` can go on.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import exclusive, write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import OutputError, RecoveryError

_SETTINGS_FILE = "settings.json"
STATE_FILE = "trainer_state.json"
_PREFIX = "checkpoint-"


class Workspace:
    """The work directory of one output directory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.directory = out.parent / f"{out.name}.recovery"

    def check(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Check, before the work begins, that an unfinished run is to be continued as it was.

        Args:
            settings: everything that must not change in a resumed run, as JSON types.
            resume: continue from what is there; without anything there, begin.

        Raises:
            OutputError: there is an unfinished run and `resume` was not asked for.
            RecoveryError: the unfinished run had other settings.
        """
        path = self.directory / _SETTINGS_FILE
        if not path.is_file():
            return
        if not resume:
            raise OutputError(
                f"{self.directory} holds an unfinished recovery; continue it with --resume, "
                "or delete it"
            )
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecoveryError(f"{path} is damaged; delete {self.directory}") from error
        for key, value in _as_json(settings).items():
            if saved.get(key) != value:
                raise RecoveryError(
                    f"the unfinished recovery in {self.directory} has {key} = {saved.get(key)}, "
                    f"now it is {value}; resume with the same arguments, or delete it"
                )

    def open(self, settings: dict[str, Any]) -> None:
        """Create the directory and write down the settings that its checkpoints belong to."""
        text = json.dumps(_as_json(settings), indent=2) + "\n"
        write_atomically(self.directory / _SETTINGS_FILE, text.encode())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say how to go on after an interruption, or leave nothing."""
        try:
            yield
        except BaseException:
            there = {path.name for path in self.directory.glob("*")} - {_SETTINGS_FILE}
            if there:
                print(
                    f"the work so far is kept in {self.directory}; the same command with "
                    "--resume goes on from it",
                    file=sys.stderr,
                )
            else:
                (self.directory / _SETTINGS_FILE).unlink(missing_ok=True)
            raise

    def remove_if_finished(self) -> None:
        """Delete what a run left that was killed when its output was there already."""
        if (self._out / MANIFEST_FILE).is_file() and self.directory.is_dir():
            with exclusive(self.directory):
                self.remove()

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; a killed process may have left half of one.

        The Trainer writes its state last, so a readable state makes a checkpoint complete.
        """
        numbered = [
            (int(path.name.removeprefix(_PREFIX)), path)
            for path in self.directory.glob(f"{_PREFIX}*")
            if path.name.removeprefix(_PREFIX).isdigit()
        ]
        return next((path for _, path in sorted(numbered, reverse=True) if _complete(path)), None)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as a file gives them back: tuples as lists."""
    value: dict[str, Any] = json.loads(json.dumps(settings))
    return value


def steps_done(checkpoint: Path) -> int:
    """Return how many steps a complete checkpoint has behind it."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return int(state["global_step"])


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
