"""From facts to one HTML page that needs nothing else: no network, no other file.

Jinja escapes every value. A Content-Security-Policy allows exactly this page's style and script, by
digest, so that even markup that slipped through could not run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError, ReportError
from cfsp.quality.results_file import read_results
from cfsp.result.conditions import texts_that_made
from cfsp.result.making import load_code, making
from cfsp.result.manifest import published
from cfsp.result.names import public_name, short_names
from cfsp.result.page.groups import ModelGroup, group_runs
from cfsp.result.page.table import answers_by_kind, headlines, sections
from cfsp.result.runs import RunFacts, read_runs, with_results

_STYLES = ("style.css", "charts.css")


def write_report(directories: Sequence[Path], out: Path, *, results: Sequence[Path] = ()) -> None:
    """Write the page of one run or several.

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
    runs = read_runs(directories)
    for path in results:
        runs = with_results(runs, read_results(path))
    write_atomically(out, render_page(group_runs(runs)).encode())


def render_page(groups: Sequence[ModelGroup]) -> str:
    """Return the page."""
    style = "\n".join(map(page_file, _STYLES))
    script = page_file("charts.js")
    runs = [run for group in groups for run in group.runs]
    bases = ", ".join(group.base for group in groups)
    environment = Environment(
        loader=PackageLoader("cfsp.result.page", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=f"{bases}, pruned" if len(runs) == 1 else f"{bases}: {len(runs)} runs",
        policy=(
            f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        groups=groups,
        detailed=[run for group in groups for run in group.detailed],
        answers_by_kind=answers_by_kind,
        headlines=headlines,
        sections=sections,
        making=lambda run: making(run.manifest),
        # From beside it; nothing where its weights were not kept.
        load=lambda run: (
            run.has_weights and load_code(run.manifest, public_name(str(run.directory)))
        ),
        manifest=_manifest_text,
        version=version("cfsp-llm"),
    )


def page_file(name: str) -> str:
    """Return one of the files that the page is made of."""
    return files("cfsp.result.page").joinpath("assets", name).read_text(encoding="utf-8")


def _manifest_text(run: RunFacts) -> str:
    """Return the manifest as indented JSON, without paths of the machine."""
    text = json.dumps(published(run.manifest), indent=2, ensure_ascii=False)
    texts = [fact.text for fact in run.facts if fact.text]
    texts += sorted(texts_that_made(run.manifest))
    names = {**short_names(texts), run.base_name: public_name(run.base_name)}
    if teacher := (run.manifest.get("recovery") or {}).get("teacher"):
        names[teacher["name"]] = public_name(teacher["name"])
    for name, short in names.items():
        written, public = (json.dumps(each, ensure_ascii=False) for each in (name, short))
        text = text.replace(written, public)
    return text


def _check_is_replaceable(out: Path) -> None:
    """Check that a page may go there: a report is made anew often, another page is somebody's."""
    if out.suffix not in (".html", ".htm"):
        raise ReportError(f"the report is a web page: expected a name like report.html, not {out}")
    try:
        with out.open(encoding="utf-8", errors="replace") as file:
            head = file.read(2000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"cannot replace {out}: {error.strerror}; choose another --out"
        ) from error
    generator = '<meta name="generator" content="cfsp '
    if not head.startswith("<!doctype html>") or generator not in head:
        raise OutputError(
            f"{out} exists and is no report of cfsp; delete it or choose another --out"
        )


def _digest(text: str) -> str:
    """Return the source expression that allows exactly this inline text."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()
