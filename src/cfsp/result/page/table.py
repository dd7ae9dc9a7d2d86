"""The facts of several runs side by side: one column for the original, one for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cfsp.result.facts import COUNT, NOTHING, QUALITY, SIZE, SPEED, Fact, labels
from cfsp.result.measured import AGREEMENT, ANSWERS, PAIRS, TASKS, Document
from cfsp.result.runs import RunFacts

_HEADINGS = (SIZE, ANSWERS, QUALITY, AGREEMENT, TASKS, PAIRS, SPEED)
_MOST_HEADLINES = {QUALITY: 2, SPEED: 1}


@dataclass(frozen=True)
class Cell:
    """A number and a remark about it."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A number of the original and of each run."""

    name: str
    cells: Sequence[Cell]  # the original first
    detail: str = ""  # the conditions, in small letters
    hint: str = ""  # more of them


@dataclass(frozen=True)
class Headline:
    """A number in large type."""

    value: str
    noun: str
    detail: str


def sections(runs: Sequence[RunFacts]) -> dict[str, list[Row]]:
    """Return the rows of runs of one model, under headings; headings without rows are left out."""
    found: dict[object, dict[str, Fact]] = {}
    for run in runs:
        for fact in run.facts:
            found.setdefault(fact.key, {})[run.name] = fact
    rows: dict[str, list[tuple[str, Row]]] = {heading: [] for heading in _HEADINGS}
    names = labels(fact for run in runs for fact in run.facts)
    for facts in found.values():
        first = next(iter(facts.values()))
        rows[first.heading].append((first.text, _row(facts, runs, names[first])))
    order = list(dict.fromkeys(fact.text for fact in names))
    # What was measured on one text stands together.
    return {
        heading: [row for _, row in sorted(of, key=lambda pair: order.index(pair[0]))]
        for heading, of in rows.items()
        if of
    }


def headlines(run: RunFacts) -> list[Headline]:
    """Return the few numbers that sum up a run."""
    names, lines = labels(run.facts), []
    for heading in (SIZE, QUALITY, SPEED):
        facts = [
            fact
            for fact in run.under(heading)
            if fact.change or (fact.unit is COUNT and fact.before is None)
        ]
        if heading == SPEED:
            facts = [fact for fact in facts if fact.name.startswith("decode")]
        for fact in facts[: _MOST_HEADLINES.get(heading)]:
            before, after, change = fact.row
            told = [f"{before} to {after}"] if fact.before else []
            told += [SPEED.lower()] if heading == SPEED else []
            told += [str(fact.conditions)] if fact.conditions else []
            told += [fact.detail] if fact.detail else []
            lines.append(Headline(change or after, names[fact], ", ".join(told)))
    return lines


def answers_by_kind(
    base: str, runs: Sequence[RunFacts]
) -> dict[str, dict[str, list[tuple[str, Document]]]]:
    """Return kind -> question -> the models and what they answered, the original first."""
    found: dict[str, dict[str, list[tuple[str, Document]]]] = {}
    for run in runs:
        for dense, own in run.answers:
            of_kind = found.setdefault(own["kind"], {})
            of_kind.setdefault(own["question"], [(base, dense)]).append((run.name, own))
    return found


def _row(facts: dict[str, Fact], runs: Sequence[RunFacts], name: str) -> Row:
    """Return the row of one fact of several runs; the original is known from any of them."""
    first = next(iter(facts.values()))
    before = next((fact.before for fact in facts.values() if fact.before is not None), None)
    cells = [Cell(first.unit(before), first.note(before))]
    for run in runs:
        fact = facts.get(run.name)
        if fact is not None and fact.after is not None:
            fact = replace(fact, before=before)
            cells.append(Cell(fact.unit(fact.after), fact.change or fact.note(fact.after)))
        elif first.unit is COUNT and run.under(SIZE):
            cells.append(Cell(first.unit(before)))  # a part of which nothing could go
        else:
            cells.append(Cell(NOTHING))
    details = {fact.detail for fact in facts.values()}
    detail = details.pop() if len(details) == 1 else ""
    if first.conditions is None:
        return Row(name, cells, detail)
    how = first.conditions.beside({run.name: run.manifest for run in runs})
    return Row(name, cells, how, f"{first.conditions.tokens:,} predicted tokens")
