"""From facts to one HTML page that needs nothing else: no network, no other file.

Jinja escapes every value. A Content-Security-Policy allows exactly this page's style and script, by
digest, so that even markup that slipped through could not run.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError, ReportError
from cfsp.quality.results_file import read_results
from cfsp.quality.results_file import refusing_damage as refusing_damaged_results
from cfsp.result.facts import PARAMETERS, QUALITY, SIZE, SPEED, labels, was_pruned
from cfsp.result.making import load_code, making
from cfsp.result.manifest import refusing_damage
from cfsp.result.names import public_name
from cfsp.result.page.by_block import block_chart
from cfsp.result.page.chart import TEMPLATES, Chart, pareto_chart, recovery_chart
from cfsp.result.runs import Document, RunFacts, read_runs, sections, with_results

_STYLES = ("style.css", "charts.css")
# More are neither columns side by side nor drawings under each other that anybody would read.
MOST_IN_DETAIL = 8


class ModelGroup(NamedTuple):
    """Runs of one original, those that are drawn by block and those that are not, and charts."""

    base: str
    runs: Sequence[RunFacts]
    detailed: Sequence[RunFacts]
    brief: Sequence[RunFacts]
    charts: Sequence[Chart]


def write_report(given: Sequence[Path], out: Path) -> None:
    """Write the page of one run or several, or in the place of an older one.

    Beside directories of runs there may be files of `cfsp eval --out` or `cfsp bench --json`, of
    the runs and their originals.
    """
    _check_is_replaceable(out)
    results = [path for path in given if path.is_file()]
    runs, page = read_runs([path for path in given if path not in results]), ""
    if not runs:
        beside = f" beside {results[0]}" if results else ""
        raise ReportError(f"expected the directory of a run{beside}, found none")
    for run in runs:
        # Each alone at first, so that damage is found with its file.
        with refusing_damage(run.directory):
            page = render_page(group_runs([run]))
    for path in results:
        with refusing_damaged_results([path]):
            runs = with_results(runs, read_results(path))
            page = render_page(group_runs(runs))
    if not results and len(runs) > 1:
        page = render_page(group_runs(runs))
    write_atomically(out, page.encode())


def render_page(groups: Sequence[ModelGroup]) -> str:
    """Return the page."""
    style = "\n".join(map(page_file, _STYLES))
    script = page_file("charts.js")
    runs = [run for group in groups for run in group.runs]
    bases = ", ".join(group.base for group in groups)
    verbs = dict.fromkeys(stage.verb for stage in making(runs[0].manifest))
    return TEMPLATES.get_template("report.html").render(
        title=f"{bases}, {' and '.join(verbs)}" if len(runs) == 1 else f"{bases}: {len(runs)} runs",
        pruned=any(was_pruned(run.manifest) for run in runs),
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
            any(run.directory.glob("model*.safetensors"))
            and load_code(run.manifest, public_name(str(run.directory)))
        ),
        version=version("cfsp-llm"),
    )


def group_runs(runs: Sequence[RunFacts]) -> list[ModelGroup]:
    """Put runs of the same original together, and draw each group's charts."""
    by_base: dict[str, list[RunFacts]] = {}
    for run in runs:
        # Of a model that was never pruned nobody noted it: it is nobody else's.
        base = run.manifest.get("base_model", {}).get("fingerprint", str(run.directory))
        by_base.setdefault(base, []).append(run)
    groups = []
    for group in by_base.values():
        detailed, brief = group[:MOST_IN_DETAIL], group[MOST_IN_DETAIL:]
        pruned = _without_recovered_twins(detailed)
        charts = (
            pareto_chart(group),
            block_chart(pruned),
            block_chart(pruned, "kv"),
            recovery_chart(detailed),
        )
        shown = [chart for chart in charts if chart is not None]
        base = public_name(group[0].base_name)
        groups.append(ModelGroup(base, group, detailed, brief, shown))
    return groups


def _without_recovered_twins(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Leave out recovered runs whose plan another run has: recovery does not change it."""
    shown: list[RunFacts] = []
    for run in sorted(runs, key=lambda each: bool(each.recovery_history)):
        if not run.recovery_history or run.plan not in [other.plan for other in shown]:
            shown.append(run)
    return shown


def page_file(name: str) -> str:
    """Return one of the files that the page is made of."""
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


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
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()


class Headline(NamedTuple):
    """A number in large type."""

    value: str
    noun: str
    detail: str


def headlines(run: RunFacts) -> list[Headline]:
    """Return the few numbers that sum up a run."""
    # What is whole is no headline, but how large the model is.
    told = [
        fact
        for fact in run.under(SIZE)
        if fact.before is None or fact.name == PARAMETERS or fact.before != fact.after
    ]
    told += [fact for fact in run.under(QUALITY) if fact.change][:2]
    decoded = [fact for fact in run.under(SPEED) if fact.name.startswith("decode")]
    told += [fact for fact in decoded if fact.change][:1]
    names, lines = labels(run.facts), []
    for fact in told:
        before, after, change = fact.row
        details = (
            f"{before} to {after}" if fact.before else "",
            SPEED.lower() if fact.heading == SPEED else "",
            str(fact.conditions or ""),
            fact.detail,
        )
        lines.append(Headline(change or after, names[fact], ", ".join(filter(None, details))))
    return lines


def answers_by_kind(
    base: str, runs: Sequence[RunFacts]
) -> dict[str, dict[tuple[str, int], list[tuple[str, Document]]]]:
    """Return kind -> question -> the models and what they answered, the original first.

    Chats may begin alike: a question has its place among all.
    """
    found: dict[str, dict[tuple[str, int], list[tuple[str, Document]]]] = {}
    for run in runs:
        for place, (dense, own) in enumerate(run.answers):
            of_kind = found.setdefault(own["kind"], {})
            of_kind.setdefault((own["question"], place), [(base, dense)]).append((run.name, own))
    return found
