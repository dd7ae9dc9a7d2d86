"""Which tasks to run, and how. Imports nothing heavy."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cfsp.checkpoint.locating import hub_is_missed
from cfsp.errors import TaskError, UsageError

# The tasks of the paper's tables, by their names in the harness.
PAPER_SUITE = (
    "hellaswag",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "boolq",
    "mmlu",
)
SUITES = {"cfsp-paper": PAPER_SUITE}
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class TaskSelection:
    """Tasks and how to run them."""

    names: tuple[str, ...]  # of tasks, groups or tags of the harness, or of `SUITES`
    limit: int | None = None  # documents of each task; None for all
    shots: int | None = None  # solved examples first; None for what the task says (mostly 0)
    data: Path | None = None  # directory of JSONL files; None for the harness's own, from the hub
    batch: int = DEFAULT_BATCH  # requests that pass together

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("expected at least one task, found none; give --tasks piqa,arc_easy")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be at least 1, found {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise UsageError(f"--shots must be at least 0, found {self.shots}")
        if self.data is not None and not self.data.is_dir():
            raise TaskError(f"the task directory {self.data} does not exist")

    @property
    def task_names(self) -> list[str]:
        """Names with suites replaced by their tasks, each once, in the order given."""
        names = [task for name in self.names for task in SUITES.get(name, (name,))]
        return list(dict.fromkeys(names))

    def check_source(self) -> None:
        """Check that the hub can be reached where the data come from there.

        The hub's client itself tries for half a minute. A misspelt name is no matter of the hub:
        `check_known` comes first.
        """
        if self.data is None and hub_is_missed():
            raise TaskError(
                f"the hub, which has the data of {', '.join(self.task_names)}, cannot be reached "
                "from here; give local files with --task-data, or set HF_HUB_OFFLINE=1 to read a "
                "copy in its cache"
            )


def jsonl_task_directory() -> Path:
    """Return the directory of the harness tasks that read JSONL files."""
    return Path(str(resources.files("cfsp.quality.tasks").joinpath("jsonl")))


def check_known(names: list[str], known: list[str], where: str) -> None:
    """Check that every task is known, or tell of names that look alike."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *SUITES], n=3)
            usual = [task for suite in SUITES.values() for task in suite if task in known]
            advice = (
                f"did you mean {' or '.join(close)}?"
                if close
                else f"it has, for example: {', '.join((usual or known)[:12])}"
            )
            raise TaskError(f"{where} has no task {name!r}; {advice}")
