"""From facts to one HTML page that needs nothing else: no network, no other file.

Jinja escapes every value. The only data that scripts read is JSON in a block that is not
executed, with `<` escaped. A Content-Security-Policy allows exactly this page's style and
script, by digest, so that even markup that slipped through could not run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cfsp.report.chart import Chart
from cfsp.report.method_chart import method_chart
from cfsp.report.pareto_chart import pareto_chart
from cfsp.report.reconstruction_chart import reconstruction_chart, sequential_chart
from cfsp.report.recovery_chart import recovery_chart
from cfsp.report.reproduction import reproduction
from cfsp.report.restoration_chart import restoration_chart
from cfsp.report.run_facts import RunFacts
from cfsp.report.selection import runs_in_detail
from cfsp.report.strength_chart import strength_chart
from cfsp.report.summary import headlines, summary_rows
from cfsp.report.what_if import what_if_data

_STYLES = ("style.css", "charts.css")
_SCRIPTS = ("allocation.js", "what_if.js", "charts.js")


@dataclass(frozen=True)
class ModelGroup:
    """Runs of one original, and their charts.

    Attributes:
        base: the original.
        runs: all of them.
        detailed: those that charts by block, slider and manifests are of.
        charts: of both.
    """

    base: str
    runs: Sequence[RunFacts]
    detailed: Sequence[RunFacts]
    charts: Sequence[Chart]

    @property
    def brief(self) -> list[RunFacts]:
        """The runs that are not shown in detail."""
        shown = {run.name for run in self.detailed}
        return [run for run in self.runs if run.name not in shown]


def group_runs(runs: Sequence[RunFacts]) -> list[ModelGroup]:
    """Put runs of the same original together, and draw each group's charts."""
    by_base: dict[str, list[RunFacts]] = {}
    for run in runs:
        by_base.setdefault(run.base_fingerprint, []).append(run)
    groups = []
    for group in by_base.values():
        detailed = runs_in_detail(group)
        groups.append(ModelGroup(group[0].base_name, group, detailed, _charts(group, detailed)))
    return groups


def render_page(groups: Sequence[ModelGroup]) -> str:
    """Return the page."""
    runs = [run for group in groups for run in group.detailed]
    style = "\n".join(map(page_file, _STYLES))
    script = "\n".join(map(page_file, _SCRIPTS))
    environment = Environment(
        loader=PackageLoader("cfsp.report", "assets"),
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
        what_if=Markup(script_json(what_if := _what_if(runs))),
        what_if_names=[run["name"] for run in what_if],
        reproductions=[reproduction(run) for run in runs],
        version=version("cfsp-llm"),
    )


def script_json(value: Any) -> str:
    """Return JSON that cannot end the script element that holds it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_file(name: str) -> str:
    """Return one of the files that the page is made of."""
    return files("cfsp.report").joinpath("assets", name).read_text(encoding="utf-8")


def _charts(runs: Sequence[RunFacts], detailed: Sequence[RunFacts]) -> list[Chart]:
    kinds = (
        method_chart,
        strength_chart,
        restoration_chart,
        sequential_chart,
        reconstruction_chart,
        recovery_chart,
    )
    charts = [pareto_chart(runs), *(kind(detailed) for kind in kinds)]
    return [chart for chart in charts if chart is not None]


def _what_if(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    return [data for run in runs if (data := what_if_data(run)) is not None]


def _title(groups: Sequence[ModelGroup]) -> str:
    runs = [run for group in groups for run in group.runs]
    bases = ", ".join(group.base for group in groups)
    return f"{bases}, pruned" if len(runs) == 1 else f"{bases}: {len(runs)} runs"


def _digest(text: str) -> str:
    """Return the source expression that allows exactly this inline text."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()
