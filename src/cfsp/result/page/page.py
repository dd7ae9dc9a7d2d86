"""From facts to one HTML page that needs nothing else: no network, no other file.

Jinja escapes every value. A Content-Security-Policy allows exactly this page's style and script, by
digest, so that even markup that slipped through could not run.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cfsp.result.page.groups import ModelGroup
from cfsp.result.reproduction import reproduction
from cfsp.result.summary import headlines, summary_rows

_STYLES = ("style.css", "charts.css")


def render_page(groups: Sequence[ModelGroup]) -> str:
    """Return the page."""
    runs = [run for group in groups for run in group.detailed]
    style = "\n".join(map(page_file, _STYLES))
    script = page_file("charts.js")
    environment = Environment(
        loader=PackageLoader("cfsp.result.page", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=_title(groups),
        policy=(
            f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        groups=[
            {
                "base": group.base,
                "runs": group.runs,
                "detailed": group.detailed,
                "brief": [(run.name, reproduction(run).commands) for run in group.brief],
                "charts": group.charts,
                "headlines": headlines(group.runs[0]) if len(group.runs) == 1 else [],
                "sections": summary_rows(group.runs),
            }
            for group in groups
        ],
        reproductions=[reproduction(run) for run in runs],
        version=version("cfsp-llm"),
    )


def page_file(name: str) -> str:
    """Return one of the files that the page is made of."""
    return files("cfsp.result.page").joinpath("assets", name).read_text(encoding="utf-8")


def _title(groups: Sequence[ModelGroup]) -> str:
    runs = [run for group in groups for run in group.runs]
    bases = ", ".join(group.base for group in groups)
    return f"{bases}, pruned" if len(runs) == 1 else f"{bases}: {len(runs)} runs"


def _digest(text: str) -> str:
    """Return the source expression that allows exactly this inline text."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()


def is_page(text: str) -> bool:
    """Return whether a file's beginning is that of a page that `render_page` made."""
    return text.startswith("<!doctype html>") and '<meta name="generator" content="cfsp ' in text
