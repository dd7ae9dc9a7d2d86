"""What went in and what came out, as a table: one column for the original, one for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from cfsp.architecture.block_names import blocks_in_words
from cfsp.result.conditions import Conditions
from cfsp.result.runs import RunFacts


@dataclass(frozen=True)
class Cell:
    """A number and a remark about it."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A measure of the original and of each run.

    Attributes:
        name: what is measured.
        cells: the original first.
        hint: the full name where `name` is shortened, or how it was measured.
        detail: the conditions, in small letters.
    """

    name: str
    cells: Sequence[Cell]
    hint: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Headline:
    """A number in large type."""

    value: str
    noun: str
    detail: str


NOTHING = "\N{EN DASH}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_MINUS = "\N{MINUS SIGN}"
_NOTHING = Cell(NOTHING)


def summary_rows(runs: Sequence[RunFacts]) -> dict[str, list[Row]]:
    """Return the rows of runs of one model, under headings; headings without rows are left out."""
    sections = {
        "Size": _size(runs),
        "Perplexity": _perplexity(runs),
        "Agreement with the original": _agreement(runs),
        "Tasks": _tasks(runs),
        "Tasks in pairs with the original": _task_pairs(runs),
        "Tokens per second": _speed(runs),
    }
    return {heading: rows for heading, rows in sections.items() if rows}


# What a manifest says of the same form, and what it is called.
_OTHER_PARTS = {"kv_groups": "KV groups", "experts": "experts"}


def headlines(run: RunFacts) -> list[Headline]:
    """Return the few numbers that sum up a run."""
    manifest = run.manifest
    lines = []
    if "model_sparsity" in manifest:
        lines.append(
            Headline(
                percent_less(manifest["model_sparsity"]),
                "parameters",
                f"{count(manifest['parameters_before'])} to {count(manifest['parameters_after'])}",
            )
        )
    lines += [
        Headline(str(len(removed)), f"{noun} removed", blocks_in_words(removed))
        for noun in ("blocks", "attentions")
        if (removed := manifest.get(f"removed_{noun}"))
    ]
    if "ffn_sparsity" in manifest:
        before, after = sum(manifest["widths_before"]), sum(manifest["intermediate_sizes"])
        lines.append(
            Headline(percent_less(_channels_gone(run)), "FFN channels", f"{before:,} to {after:,}")
        )
    for key, noun in _OTHER_PARTS.items():
        if part := manifest.get(key):
            before, after = sum(part["before"]), sum(part["after"])
            share = percent_less(part["sparsity"])
            lines.append(Headline(share, noun, f"{before:,} to {after:,}"))
    names = short_names(each.text for each in run.measured.perplexity)
    compared = {k: v for k, v in run.measured.perplexity.items() if len(v) == 2}
    for conditions, value in list(compared.items())[:2]:
        detail = (
            f"{value['before']:.2f} to {value['after']:.2f} on {names[conditions.text]}, "
            f"{conditions}"
        )
        ratio = value["after"] / value["before"]
        lines.append(Headline(f"{_TIMES} {ratio:.2f}", "perplexity", detail))
    for phase, speed in run.measured.speed.items():
        if phase.startswith("decode") and "ratio" in speed:
            detail = f"{speed['before']:.1f} to {speed['after']:.1f} tokens/s"
            lines.append(Headline(f"{_TIMES} {speed['ratio']:.2f}", "decode speed", detail))
            break
    return lines


def _channels_gone(run: RunFacts) -> float:
    """Return the share of FFN channels that went; beside experts only of those that stay."""
    manifest = run.manifest
    if "experts" not in manifest:
        return float(manifest["ffn_sparsity"])
    return 1 - float(sum(manifest["intermediate_sizes"]) / sum(manifest["widths_before"]))


def _size(runs: Sequence[RunFacts]) -> list[Row]:
    known = [run for run in runs if "parameters_before" in run.manifest]
    if not known:
        return []
    first = known[0].manifest
    left = [_left(run) if run in known else {} for run in runs]
    rows = [
        Row(name, [Cell(f"{before:,}"), *(cells.get(name, _NOTHING) for cells in left)])
        for name, before in (
            ("parameters", first["parameters_before"]),
            ("FFN channels", sum(first["widths_before"])),
        )
    ]
    for key, noun in _OTHER_PARTS.items():
        with_part = [run.manifest[key] for run in known if key in run.manifest]
        if with_part:
            before = sum(with_part[0]["before"])
            cells = [_part_cell(run.manifest.get(key), before) for run in runs]
            rows.append(Row(noun, [Cell(f"{before:,}"), *cells]))
    if not all(run.weight_bytes for run in runs):
        return rows  # a sweep keeps no weights
    each = known[0].weight_bytes / first["parameters_after"]
    dense = f"≈ {megabytes(each * first['parameters_before'])}"
    disk = [Cell(dense), *(Cell(megabytes(run.weight_bytes)) for run in runs)]
    hint = "the original's size is its parameters at the same bytes each"
    return [*rows, Row("weights on disk", disk, hint)]


def _left(run: RunFacts) -> dict[str, Cell]:
    """Return what a run has left, by the name of its row."""
    parameters, channels = run.manifest["parameters_after"], run.manifest["intermediate_sizes"]
    gone = run.manifest["model_sparsity"]
    return {
        "parameters": Cell(f"{parameters:,}", percent_less(gone)),
        "FFN channels": Cell(f"{sum(channels):,}", percent_less(_channels_gone(run))),
    }


def _part_cell(part: dict[str, Any] | None, before: int) -> Cell:
    """Return how many KV groups or experts a run has left; where none could go, all."""
    if not part:
        return Cell(f"{before:,}")
    return Cell(f"{sum(part['after']):,}", percent_less(part["sparsity"]))


def measured_conditions(runs: Sequence[RunFacts]) -> list[Conditions]:
    """Return all conditions of perplexities, those of one text one after the other."""
    found = dict.fromkeys(each for run in runs for each in run.measured.perplexity)
    texts = list(dict.fromkeys(each.text for each in found))
    return sorted(found, key=lambda each: texts.index(each.text))


def perplexity_of_original(runs: Sequence[RunFacts], conditions: Conditions) -> float | None:
    """Return the original's perplexity under the same conditions; None if it was not measured."""
    sides = (run.measured.perplexity.get(conditions, {}) for run in runs)
    return next((each["before"] for each in sides if "before" in each), None)


def _perplexity(runs: Sequence[RunFacts]) -> list[Row]:
    every = measured_conditions(runs)
    names = short_names(each.text for each in every)
    models = {run.name: run.manifest for run in runs}
    rows = []
    for conditions in every:
        dense = perplexity_of_original(runs, conditions)
        cells = [_NOTHING if dense is None else Cell(f"{dense:.2f}")]
        for run in runs:
            value = run.measured.perplexity.get(conditions, {}).get("after")
            note = f"{_TIMES} {value / dense:.2f}" if value is not None and dense else ""
            cells.append(_NOTHING if value is None else Cell(f"{value:.2f}", note))
        hint = f"{conditions.text}, {conditions.tokens:,} predicted tokens"
        rows.append(Row(names[conditions.text], cells, hint, conditions.beside(models)))
    return rows


def _tasks(runs: Sequence[RunFacts]) -> list[Row]:
    rows = []
    for task in _ordered(task for run in runs for task in run.measured.tasks):
        for metric in ("acc", "acc_norm"):
            scores = [run.measured.tasks.get(task, {}) for run in runs]
            dense = next((each["before"] for each in scores if "before" in each), {})
            cells = [_score(dense, metric), *(_score(s.get("after", {}), metric) for s in scores)]
            if any(cell is not _NOTHING for cell in cells):
                rows.append(Row(f"{task}, {metric}", cells, "percent, with the standard error"))
    return rows


def _agreement(runs: Sequence[RunFacts]) -> list[Row]:
    """Return two rows for each text: KL per token, and how many first choices are equal."""
    found = [(run.measured.comparison or {}).get("texts", {}) for run in runs]
    names = short_names(text for of_run in found for text in of_run)
    rows = []
    for text, name in names.items():
        for key, title, digits, factor in _AGREEMENT:
            pairs = [of_run.get(text, {}).get(key) for of_run in found]
            if any(pairs):
                cells = [_estimate(pair and pair["second"], digits, factor) for pair in pairs]
                rows.append(Row(f"{title}, {name}", [_NOTHING, *cells], text))
    return rows


_AGREEMENT = (
    ("divergence", "KL per token, nats", 3, 1.0),
    ("agreed", "equal first choices, percent", 1, 100.0),
)


def _task_pairs(runs: Sequence[RunFacts]) -> list[Row]:
    """Return what tasks lost, document by document, and how many answers are the original's."""
    found = [run.measured.comparison or {} for run in runs]
    rows = []
    for task in _ordered(task for of_run in found for task in of_run.get("tasks", {})):
        pairs = [of_run.get("tasks", {}).get(task) or {} for of_run in found]
        guessed = any(pair.get("is_above_chance") is False for pair in pairs)
        detail = "the original does not beat a guess; not in the mean" if guessed else ""
        rows += _pair_rows(task, [(p.get("accuracy"), p.get("kept")) for p in pairs], detail)
        losses = [pair.get("loss") for pair in pairs]
        if any(losses):
            cells = [_estimate(loss and loss["difference"], 3, 1.0) for loss in losses]
            rows.append(Row(f"{task}, loss - original's, nats", [_NOTHING, *cells]))
    means = [(of_run.get("accuracy"), of_run.get("kept")) for of_run in found]
    return [*rows, *_pair_rows("mean of tasks", means, "")]


def _pair_rows(
    name: str, pairs: Sequence[tuple[dict[str, Any] | None, dict[str, Any] | None]], detail: str
) -> list[Row]:
    rows = []
    accuracy = [_estimate(pair[0] and pair[0]["difference"], 1, 100) for pair in pairs]
    if any(pair[0] for pair in pairs):
        hint = "percent, with the standard error of the paired difference"
        rows.append(Row(f"{name}, accuracy - original's", [_NOTHING, *accuracy], hint, detail))
    kept = [_estimate(pair[1] and pair[1]["second"], 1, 100) for pair in pairs]
    if any(pair[1] for pair in pairs):
        hint = "percent of the answers, right or wrong"
        rows.append(Row(f"{name}, answers as the original's", [_NOTHING, *kept], hint))
    return rows


def _estimate(found: dict[str, Any] | None, digits: int, factor: float) -> Cell:
    if found is None:
        return _NOTHING
    value, error = factor * found["value"], found["stderr"]
    shown = f"{value:z.{digits}f}".replace("-", _MINUS)
    return Cell(shown, "" if error is None else f"± {factor * error:.{digits}f}")


def _score(scores: dict[str, Any], metric: str) -> Cell:
    if metric not in scores:
        return _NOTHING
    error = scores.get(f"{metric}_stderr")
    return Cell(f"{100 * scores[metric]:.1f}", "" if error is None else f"± {100 * error:.1f}")


def _speed(runs: Sequence[RunFacts]) -> list[Row]:
    """Return a row for each phase and workload; a run's ratio is to the original timed with it."""
    rows = []
    for phase in _ordered(phase for run in runs for phase in run.measured.speed):
        speeds = [run.measured.speed.get(phase, {}) for run in runs]
        dense = next((speed["before"] for speed in speeds if "before" in speed), None)
        cells = [_NOTHING if dense is None else Cell(f"{dense:,.1f}")]
        for speed in speeds:
            note = f"{_TIMES} {speed['ratio']:.2f}" if "ratio" in speed else ""
            cells.append(Cell(f"{speed['after']:,.1f}", note) if "after" in speed else _NOTHING)
        rows.append(Row(phase, cells, "tokens per second: median of interleaved rounds"))
    return rows


def percent_less(share: float) -> str:
    """Return how much less something is: −20.1%."""
    return f"{_MINUS}{share:.1%}" if share > 0 else f"{-share:.1%}"


def count(number: float) -> str:
    """Return a count with a suffix: 134.5 M."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f}"


def megabytes(number: float) -> str:
    """Return a size in decimal units, as file managers and the hub show it: 189.4 MB."""
    for limit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f} B"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the last parts of paths, as many as keep the names apart, at least two."""
    names = list(dict.fromkeys(names))
    longest = max((len(PurePath(name).parts) for name in names), default=0)
    for parts in range(2, longest + 1):
        short = ["/".join(PurePath(name).parts[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
