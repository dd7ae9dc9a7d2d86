"""`cfsp compare`: models in pairs, window by window and document by document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.cli import arguments
from cfsp.cli.output import estimate, print_json, print_table
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.quality.compare import Comparison, Pair, TaskPair
    from cfsp.quality.results_file import MeasuredModel


_SIDES = ("first, second", "difference")


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "compare",
        "compare measured models in pairs, with the standard error of each difference",
        "cfsp compare a.json b.json --against dense.json",
    )
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
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare and print."""
    from cfsp.quality.compare import comparisons
    from cfsp.quality.results_file import joined_models, models_in

    measured = [each for file in args.files for each in models_in(file)]
    # The name of a dense model may be that of a file, too: a GGUF.
    is_named = any(each.name == args.against for each in measured)
    has_file = args.against is not None and not is_named and Path(args.against).is_file()
    of_file = models_in(Path(args.against)) if has_file else []
    models = joined_models([*measured, *of_file])
    dense = _same(models, of_file[0]) if of_file else _dense(models, args.against)
    base = None if args.base is None else _named(models, args.base, "--base")
    found = comparisons(models, dense, base)
    if args.json:
        name = None if dense is None else dense.name
        print_json({"against": name, "pairs": [each.to_json() for each in found]})
        return
    for number, each in enumerate(found):
        if number:
            print()
        _print(each)
    against = "no dense model is known: nothing is said of chance" if dense is None else dense.name
    print(f"\nagainst {against}; differences are second - first, with their standard errors")


def _dense(models: Sequence[MeasuredModel], against: str | None) -> MeasuredModel | None:
    if against is not None:
        return _named(models, against, "--against")
    prints = {each.against for each in models} - {None}
    if len(prints) > 1:
        raise UsageError(
            "the models were compared with different dense models; name one with --against"
        )
    return next((each for each in models if each.fingerprint in prints), None)


def _same(models: Sequence[MeasuredModel], one: MeasuredModel) -> MeasuredModel:
    """Return the model that one of a file is among those of all files."""
    same = [each for each in models if each.fingerprint == one.fingerprint]
    return next((each for each in same if each.name == one.name), same[0])


def _named(models: Sequence[MeasuredModel], name: str, flag: str) -> MeasuredModel:
    for each in models:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in models)
    raise UsageError(f"{flag}: expected a model of the files ({known}), found {name!r}")


def _print(found: Comparison) -> None:
    print(f"first: {found.first}\nsecond: {found.second}\n")
    if found.texts:
        _print_texts(found)
    if found.texts and found.tasks:
        print()
    if found.tasks:
        _print_tasks(found)


def _print_texts(found: Comparison) -> None:
    head = ("text", "windows", "loss", "", "KL", "", "equal first choices, %", "")
    rows = [
        (
            pair.text,
            str(pair.windows),
            *_cells(pair.loss, 4),
            *_cells(pair.divergence, 4),
            *_cells(pair.agreed, 2, 100),
        )
        for pair in found.texts
    ]
    print_table(head, [("", "", *_SIDES * 3), *rows])


def _print_tasks(found: Comparison) -> None:
    head = ("task", "metric", "documents", "accuracy, %", "", "dense model's answers, %", "")
    rows = [
        (
            pair.task,
            pair.metric,
            str(pair.documents),
            *_cells(pair.accuracy, 1, 100),
            *_cells(pair.kept, 1, 100),
        )
        for pair in found.tasks
    ]
    if found.accuracy is not None:
        counted = len(found.tasks) - len(found.left_out)
        cells = (*_cells(found.accuracy, 1, 100), *_cells(found.kept, 1, 100))
        rows.append((f"mean of {counted}", "", "", *cells))
    print_table(head, [("", "", "", *_SIDES * 2), *rows], left=2)
    for pair in found.tasks:
        if pair.loss is not None:
            both, change = _cells(pair.loss, 4)
            print(f"\n{pair.task}, loss in nats: {both}, difference {change}")
    for pair in found.left_out:
        print(_why_left_out(pair))


def _cells(pair: Pair | None, digits: int, factor: float = 1.0) -> tuple[str, str]:
    if pair is None:
        return "-", "-"
    both = (f"{factor * each.value:.{digits}f}" for each in (pair.first, pair.second))
    return ", ".join(both), estimate(pair.difference.to_json(), digits, factor)


def _why_left_out(pair: TaskPair) -> str:
    assert pair.dense is not None
    dense = estimate(pair.dense.to_json(), 1, 100)
    return (
        f"\n{pair.task} is left out of the mean: the dense model ({dense}) is not better than a "
        f"guess ({100 * pair.chance:.1f})"
    )
