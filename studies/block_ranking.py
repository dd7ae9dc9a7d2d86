"""Study 1: does angular distance tell the blocks that can be pruned from those that cannot?

    python studies/run.py 1 --texts DIR

Half of the channels go from a few blocks only: those with the least distance, those with the
most (with and without the first block), or as many drawn by chance. Then each block is pruned
alone, and left out alone, and every distance's rank correlation with the rise of the loss is
taken. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from cfsp.settings import DISTANCES
from conditions import parser_of_model
from damage import damage_of, rank_correlation
from results import Row, table
from study import Study

SPARSITY = 0.5
LEAST, MOST, CHANCE = "least important", "most important", "random"
# The first block turned out to be a case of its own.
MOST_BUT_FIRST, CHANCE_WITH_FIRST = "most important but the first", "random, the first among them"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(arguments)
    study = Study(args, sparsity=SPARSITY, alone_windows=args.alone_windows)
    dense = study.results.measure({"what": "dense"}, _dense, study)
    groups(study)
    alone(study, dense["blocks"])
    print_tables(study)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_model("block_ranking", __doc__.splitlines()[0])
    found.add_argument("--groups", type=int, nargs="+", default=[5, 10], help="blocks to prune")
    found.add_argument("--draws", type=int, default=3, help="random groups of each size")
    found.add_argument(
        "--alone-windows", type=int, default=2, help="windows to measure each block alone on"
    )
    return found


def _dense(study: Study) -> Row:
    subject = study.subject
    return {"blocks": subject.source.config.num_hidden_layers, **subject.quality(subject.model)}


def groups(study: Study) -> None:
    """Prune the blocks that angular distance calls least and most important, and random ones."""
    for size in study.args.groups:
        kinds = [(LEAST, 0), (MOST, 0), (MOST_BUT_FIRST, 0)]
        for blocks, seed in [*kinds, *((CHANCE, seed) for seed in range(study.args.draws))]:
            key = {"what": "group", "size": size, "blocks": blocks, "seed": seed}
            study.results.measure(key, _pruned_group, study, size, blocks, seed)


def _pruned_group(study: Study, size: int, blocks: str, seed: int) -> dict[str, Any]:
    indices = group(study.statistics().distances("angular"), size, blocks, seed)
    found = study.subject.quality_of_some(study.statistics(), SPARSITY, indices)
    return {"indices": sorted(indices), **found}


def group(distance_L: Sequence[float], size: int, blocks: str, seed: int) -> list[int]:
    """Return the indices of some blocks: a kind of group by their distances."""
    order = sorted(range(len(distance_L)), key=lambda block: distance_L[block])
    if blocks == LEAST:
        return order[:size]
    if blocks == MOST:
        return order[-size:]
    if blocks == MOST_BUT_FIRST:
        return [block for block in order if block > 0][-size:]
    return random.Random(seed).sample(order, size)


def alone(study: Study, blocks: int) -> None:
    """Prune each block alone, and leave each out alone."""

    @cache
    def before() -> dict[str, float]:
        return few().quality(study.subject.model)

    @cache
    def few() -> Any:
        return study.subject.on_first(study.args.alone_windows)

    for block in range(blocks):
        study.results.measure(
            {"what": "alone", "block": block},
            lambda block=block: damage_of(few(), study.statistics(), block, SPARSITY, before()),
        )


def print_tables(study: Study) -> None:
    """Print the perplexity without some blocks' channels, and the rank correlations."""
    rows = [row for row in study.results.rows if row["what"] in ("dense", "group")]
    shown = [
        {"size": 0, "blocks": "dense"} | row | {"blocks": _kind(row)}
        for row in rows
        if row["what"] == "dense" or row["size"] in study.args.groups
    ]
    shown.sort(key=lambda row: row["size"])
    print(f"\n{table(shown, ['size', 'blocks'], study.texts)}")
    print(f"\n{correlations(study.results.rows)}")


def _kind(row: Row) -> str:
    if row["what"] == "dense":
        return "dense"
    return CHANCE_WITH_FIRST if row["blocks"] == CHANCE and 0 in row["indices"] else row["blocks"]


def correlations(rows: Sequence[Row]) -> str:
    """Return the rank correlation of every distance with the rise of the loss, as Markdown."""
    alone = [row for row in rows if row["what"] == "alone"]
    columns = {
        "half of its channels": ("pruned", alone),
        "left out": ("left out", alone),
        "half, the first block aside": ("pruned", alone[1:]),
        "left out, the first block aside": ("left out", alone[1:]),
    }
    lines = [f"| distance | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for distance in DISTANCES:
        found = [
            rank_correlation([row[distance] for row in chosen], [row[damage] for row in chosen])
            for damage, chosen in columns.values()
        ]
        lines.append(f"| {distance} | " + " | ".join(f"{value:.2f}" for value in found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
