"""Studies 5 and 6: does pruning depend on how attention and the residual stream are built?

    python studies/run.py 5 --texts DIR
    python studies/run.py 6 --texts DIR

Trains small models on the calibration texts, equal in all but what is studied (`training.py` says
what they are): heads that share keys and values or do not; normalisation before, after, or on
both sides; attention and FFN one after the other or side by side. Then each is pruned by several
block metrics, with and without repair, and each of its blocks is pruned alone and left out alone.
Prints Markdown: how the loss rises, which metric is better on the same model, and how well each
distance ranks the blocks. Models are kept, and not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cfsp.calibration.statistics import Statistics
from cfsp.engine.compute import engine_of
from cfsp.settings import DISTANCES, SENSITIVITY_METRICS, Compute, Criterion
from cfsp.sweep.table import loss_rise
from cfsp.text.drawing import draw_text
from cfsp.text.windows import few_windows
from cfsp.whole_model.sensitivity import measure_sensitivity
from conditions import calibration_text, conditions, parser_of_texts
from damage import damage_of, rank_correlation
from results import Results, Row, table
from subject import Subject, label, load_subject
from training import ARCHITECTURES, MODELS, Size, trained

ALONE_SPARSITY = 0.5
BLOCK_METRICS = (*DISTANCES, "uniform", *SENSITIVITY_METRICS)
# What `cfsp prune` would take for wider models is a coarse step here.
MULTIPLE = 8
# As many tokens as `cfsp prune` takes: its windows are eight times as long.
SENSITIVITY_WINDOWS = 32
RISES = ("plain", "repaired")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and print."""
    args = parser().parse_args(arguments)
    results = Results(args.out, conditions(args, sizes=asdict(_size(args))))
    rows: list[Row] = []
    # A seed of all architectures before the next, so that an early end has something of each.
    for seed in range(args.seeds):
        for architecture in args.architectures:
            rows += study(SmallModel(args, architecture, seed), results)
    print_tables(rows, [label(text) for text in args.eval])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_texts("architectures", __doc__.splitlines()[0])
    size = Size()
    found.set_defaults(seqlen=size.seqlen, samples=64, windows=48)
    found.add_argument("--models", type=Path, default=MODELS, help="where models are kept")
    found.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    found.add_argument("--seeds", type=int, default=3, help="models of each architecture")
    found.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    found.add_argument(
        "--blocks-by",
        nargs="+",
        choices=BLOCK_METRICS,
        default=["angular", "euclidean", "angular+sensitivity", "uniform"],
        help="block metrics",
    )
    for name in ("hidden", "blocks", "vocabulary", "tokens"):
        found.add_argument(f"--{name}", type=int, default=getattr(size, name))
    return found


def _size(args: argparse.Namespace) -> Size:
    return Size(args.hidden, args.blocks, args.vocabulary, args.tokens, args.seqlen)


class SmallModel:
    """A small model, trained and calibrated when first needed.

    Attributes:
        args: the command line.
        key: what tells its rows from those of other models.
        text: what it is calibrated on.
    """

    def __init__(self, args: argparse.Namespace, architecture: str, seed: int) -> None:
        self.args = args
        self.key = {"architecture": architecture, "seed": seed}
        self.text = calibration_text(args)

    @cached_property
    def subject(self) -> Subject:
        """The model itself."""
        args = self.args
        place = trained(**self.key, texts=args.data, size=_size(args), directory=args.models)
        return load_subject(place, args.eval, args.windows, args.seqlen)

    @cached_property
    def statistics(self) -> Statistics:
        """Those of its calibration, with the sensitivity of its blocks."""
        source = self.subject.source
        found = self.subject.calibrate(self.text)
        windows = few_windows(draw_text(self.text, self.subject.tokenizer), SENSITIVITY_WINDOWS)
        engine = engine_of(Compute(), source)
        sensitivity = measure_sensitivity(source, found, windows, Criterion(), engine)
        return replace(found, sensitivity=sensitivity)

    def dense(self) -> dict[str, float]:
        """Return its perplexity on each text."""
        return self.subject.quality(self.subject.model)

    def pruned(self, sparsity: float, blocks_by: str, dense: dict[str, float]) -> Row:
        """Return how the loss rises by pruning, without repair and with it."""
        subject = self.subject
        plan = subject.plan(self.statistics, sparsity, Criterion(blocks_by), MULTIPLE)
        found = subject.quality_of(plan), subject.quality_repaired(self.text, plan)
        return {
            name: round(loss_rise(after, dense), 5)
            for name, after in zip(RISES, found, strict=True)
        }

    def without(self, block: int, dense: dict[str, float]) -> Row:
        """Return the distances of a block, and how the loss rises without it."""
        return damage_of(self.subject, self.statistics, block, ALONE_SPARSITY, dense)


def study(model: SmallModel, results: Results) -> list[Row]:
    """Measure one model: dense, pruned, repaired, and block by block."""
    args, key = model.args, model.key
    found = [results.measure({"what": "dense", **key}, model.dense)]
    dense = {name: found[0][name] for name in map(label, args.eval)}
    for sparsity in args.sparsity:
        for blocks in args.blocks_by:
            of_plan = {"what": "pruned", **key, "sparsity": sparsity, "blocks": blocks}
            found.append(results.measure(of_plan, model.pruned, sparsity, blocks, dense))
    for block in range(args.blocks):
        of_block = {"what": "alone", **key, "block": block}
        found.append(results.measure(of_block, model.without, block, dense))
    return found


def print_tables(rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Print the loss of the dense models, its rise by pruning, and the rank correlations."""
    dense = [row for row in rows if row["what"] == "dense"]
    print(f"\nperplexity of the dense models\n\n{table(dense, ['architecture'], texts)}")
    pruned = [row for row in rows if row["what"] == "pruned"]
    columns = list(dict.fromkeys(_column(r["sparsity"], rise) for r in pruned for rise in RISES))
    for what, chosen in (
        ("rise of the loss in nats a token", pruned),
        ("above that of the default on the same model", above_default(pruned)),
    ):
        print(f"\n{what}\n\n{table(by_sparsity(chosen), ['architecture', 'blocks'], columns, 3)}")
    print(f"\nrank correlation with the rise of the loss, {ALONE_SPARSITY:.0%} of one block\n")
    print(table(correlations(rows), ["architecture", "damage"], DISTANCES, 2))


# Of `cfsp prune` when this was measured, and where the model does not fit into memory.
_DEFAULT = "angular"


def above_default(pruned: Sequence[Row]) -> list[Row]:
    """Return by how much each rise is above the default's on the same model."""

    def plan(row: Row) -> tuple[Any, ...]:
        return row["architecture"], row["seed"], row["sparsity"]

    default = {plan(row): row for row in pruned if row["blocks"] == _DEFAULT}
    pairs = [(row, default[plan(row)]) for row in pruned if plan(row) in default]
    return [
        {**row, **{rise: row[rise] - base[rise] for rise in RISES}}
        for row, base in pairs
        if row is not base
    ]


def by_sparsity(pruned: Sequence[Row]) -> list[Row]:
    """Return one row for each model and block metric, with its rises at every sparsity."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in pruned:
        key = {name: row[name] for name in ("architecture", "blocks", "seed")}
        wide = found.setdefault(tuple(key.values()), key)
        wide |= {_column(row["sparsity"], rise): row[rise] for rise in RISES}
    return list(found.values())


def _column(sparsity: float, rise: str) -> str:
    return f"{sparsity:.0%}" if rise == "plain" else f"{sparsity:.0%}, {rise}"


def correlations(rows: Sequence[Row]) -> list[Row]:
    """Return for every model how well each distance ranks its blocks by either damage."""
    models: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["what"] == "alone":
            models.setdefault((row["architecture"], row["seed"]), []).append(row)
    return [
        {
            "architecture": architecture,
            "damage": damage,
            **{
                name: rank_correlation([r[name] for r in blocks], [r[damage] for r in blocks])
                for name in DISTANCES
            },
        }
        for damage in ("pruned", "left out")
        for (architecture, _), blocks in models.items()
    ]


if __name__ == "__main__":
    main()
