"""Writing a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError, ReportError
from cfsp.result.measured import with_own_speed, with_results
from cfsp.result.page.groups import group_runs
from cfsp.result.page.page import is_page, render_page
from cfsp.result.runs import read_runs


def write_report(directories: Sequence[Path], out: Path, *, results: Sequence[Path] = ()) -> None:
    """Write the report of one run or several.

    Args:
        directories: that cfsp prune, cfsp recover or cfsp sweep wrote.
        out: the page, *.html. An older report there is replaced, and no other file.
        results: JSON files from `cfsp eval --json` or `cfsp bench --json`, of these runs and
            their originals.

    Raises:
        ReportError: a directory is none of ours, or `out` is not called *.html.
        OutputError: `out` is a file that is no report, or nothing can be written there.
        CfspError: a file in a directory is damaged.
    """
    _check_is_replaceable(out)
    runs = [with_own_speed(run) for run in read_runs(directories)]
    for path in results:
        runs = with_results(runs, _read_results(path))
    write_atomically(out, render_page(group_runs(runs)).encode())


def _check_is_replaceable(out: Path) -> None:
    """Check that a page may go there: a report is made anew often, another page is somebody's.

    Raises:
        ReportError: it is not called *.html.
        OutputError: something else is there.
    """
    if out.suffix not in (".html", ".htm"):
        raise ReportError(f"the report is a web page: expected a name like report.html, not {out}")
    try:
        with out.open(encoding="utf-8", errors="replace") as file:
            is_ours = is_page(file.read(2000))
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"cannot replace {out}: {error.strerror}; choose another --out"
        ) from error
    if not is_ours:
        raise OutputError(
            f"{out} exists and is no report of cfsp; delete it or choose another --out"
        )


def _read_results(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"cannot read {path}: {error}; make it with: cfsp eval ... --json > {path}"
        ) from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} is not what `cfsp eval --json` prints")
    return value
