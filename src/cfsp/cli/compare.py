"""Compare measured models in pairs, with the standard error of each difference.

cfsp compare a.json b.json --against dense.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.locating import exists, path_of
from cfsp.cli.options import Parser
from cfsp.cli.output import Told, estimate, print_table
from cfsp.errors import UsageError
from cfsp.quality.results_file import MeasuredModel, joined_models, models_in, refusing_damage
from cfsp.result.names import short_names

# A measure: its words, its name, digits and factor.
Measure = tuple[str, str, int, float]
_KEPT: Measure = ("answers as the dense model's, %", "kept", 1, 100)
_LOSS: Measure = ("loss, nats", "loss", 4, 1)
_OF_PREDICTIONS: tuple[Measure, ...] = (
    ("KL per token, nats", "divergence", 4, 1),
    ("top-1 agreement, %", "agreed", 2, 100),
)
_OF_TEXTS = (_LOSS, *_OF_PREDICTIONS)
_OF_ANSWERS: tuple[Measure, ...] = (
    *_OF_PREDICTIONS,
    ("answers that end, %", "stops", 1, 100),
    ("answers that loop, %", "loops", 1, 100),
    ("first tokens alike", "alike", 1, 1),
)


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what `cfsp eval --out` wrote"
    )
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="the dense model: its name in the files, or a file of its own (default: the one that "
        "`cfsp eval --against` named)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="compare all with this one, by its name in the files (default: with the dense model, "
        "and with the first of the others)",
    )


def run(args: argparse.Namespace) -> Told:
    from cfsp.quality.compare import comparisons

    measured = [each for file in args.files for each in models_in(file)]
    # The name of a dense model may be that of a file, too: a GGUF.
    is_named = any(each.name == args.against for each in measured)
    file = path_of(args.against or "")
    of_file = models_in(file) if not is_named and exists(file) and file.is_file() else []
    with refusing_damage([*args.files, *([file] if of_file else [])]):
        models = joined_models([*measured, *of_file])
        dense = _same(models, of_file[0]) if of_file else _dense(models, measured, args.against)
        base = None if args.base is None else _named(models, measured, args.base, "--base")
        found = comparisons(models, dense, base)
    against = None if dense is None else dense.name

    def say() -> None:
        for each in found:
            _print(each)
            print()
        known = against or "no dense model that is known"
        print(f"against {known}; differences are second - first, with their standard errors")

    return {"against": against, "pairs": found}, say


def _dense(
    models: Sequence[MeasuredModel], measured: Sequence[MeasuredModel], against: str | None
) -> MeasuredModel | None:
    if against is not None:
        return _named(models, measured, against, "--against")
    prints = frozenset().union(*(each.against for each in models))
    if len(prints) > 1:
        raise UsageError(
            "the models were compared with different dense models; name one with --against"
        )
    return next((each for each in models if each.fingerprint in prints), None)


def _same(models: Sequence[MeasuredModel], one: MeasuredModel) -> MeasuredModel:
    same = [each for each in models if each.fingerprint == one.fingerprint]
    return next((each for each in same if each.name == one.name), same[0])


def _named(
    models: Sequence[MeasuredModel], measured: Sequence[MeasuredModel], name: str, flag: str
) -> MeasuredModel:
    """Return a model by its name or, of one that has several, by another as it was `measured`."""
    for each in models:
        if each.name == name:
            return each
    called_so = {each.fingerprint: each for each in measured if each.name == name}
    if len(called_so) == 1:
        return _same(models, *called_so.values())
    known = ", ".join(each.name for each in models)
    raise UsageError(f"{flag}: expected a model of the files ({known}), found {name!r}")


def _print(found: dict[str, Any]) -> None:
    """Print a group of lines for each text and task, narrow enough for any terminal."""
    print(f"first: {found['first']}\nsecond: {found['second']}\n")
    names, rows = short_names(found["texts"]), []
    for text, pairs in found["texts"].items():
        rows += _rows(f"{names[text]}, {counted(pairs['windows'], 'windows')}", pairs, _OF_TEXTS)
    for name, pairs in found["tasks"].items():
        accuracy = (f"{pairs['metric']}, %", "accuracy", 1, 100)
        title = f"{name}, {counted(pairs['documents'], 'documents')}"
        rows += _rows(title, pairs, (accuracy, _KEPT, _LOSS))
    if found["accuracy"] is not None:
        counts = [task for name, task in found["tasks"].items() if name not in found["left_out"]]
        title, kept = f"mean of {counted(len(counts), 'tasks')}", _KEPT
        # Where nothing is picked, as by LAMBADA, nothing can be the dense model's.
        if (picked := sum(task["kept"] is not None for task in counts)) < len(counts):
            kept = (f"{_KEPT[0]} (of {picked})", *_KEPT[1:])
        rows += _rows(title, found, (("accuracy, %", "accuracy", 1, 100), kept))
    if found["answers"]:
        title = f"answers to {counted(found['questions'], 'questions')}"
        rows += _rows(title, found["answers"], _OF_ANSWERS)
    print_table(("", "first", "second", "difference"), rows)
    for name in found["left_out"]:
        task = found["tasks"][name]
        print(
            f"\n{name} is left out of the mean: the dense model "
            f"({estimate(task['dense'], 1, 100)}) is not better than a guess "
            f"({100 * task['chance']:.1f})"
        )


def _rows(title: str, pairs: dict[str, Any], measures: Iterable[Measure]) -> list[tuple[str, ...]]:
    lines = [
        (
            f"  {words}",
            *(f"{factor * pair[side]['value']:z.{digits}f}" for side in ("first", "second")),
            estimate(pair["difference"], digits, factor),
        )
        for words, name, digits, factor in measures
        if (pair := pairs[name]) is not None
    ]
    return [(title, "", "", ""), *lines]
