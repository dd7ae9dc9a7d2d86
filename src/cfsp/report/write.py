"""Writing a report, and its charts as pictures for a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError, ReportError
from cfsp.report.groups import ModelGroup, group_runs
from cfsp.report.measured import with_own_speed, with_results
from cfsp.report.page import is_page, render_page
from cfsp.report.pictures import load_renderer, picture_svg
from cfsp.report.runs import read_runs


def write_report(
    directories: Sequence[Path],
    out: Path,
    *,
    results: Sequence[Path] = (),
    png: Path | None = None,
) -> list[Path]:
    """Write the report of one run or several.

    Args:
        directories: that cfsp prune, cfsp recover or cfsp sweep wrote.
        out: the page, *.html. An older report there is replaced, and no other file.
        results: JSON files from `cfsp eval --json` or `cfsp bench --json`, of these runs and
            their originals.
        png: a directory for the charts as pictures.

    Returns:
        Everything that was written; the page first.

    Raises:
        ReportError: a directory is none of ours, or `out` is not called *.html.
        OutputError: `out` is a file that is no report, or nothing can be written there.
        CfspError: a file in a directory is damaged.
    """
    _check_is_replaceable(out)
    runs = [with_own_speed(run) for run in read_runs(directories)]
    for path in results:
        runs = with_results(runs, _read_results(path))
    groups = group_runs(runs)
    pictures = _pictures(groups, png) if png else {}
    write_atomically(out, render_page(groups).encode())
    for path, data in pictures.items():
        write_atomically(path, data)
    return [out, *pictures]


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


def _pictures(groups: Sequence[ModelGroup], directory: Path) -> dict[Path, bytes]:
    render = load_renderer()
    pictures = {}
    for number, group in enumerate(groups):
        prefix = f"{number + 1}-" if len(groups) > 1 else ""
        for chart in group.charts:
            pictures[directory / f"{prefix}{chart.key}.png"] = render(picture_svg(chart))
    return pictures


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
