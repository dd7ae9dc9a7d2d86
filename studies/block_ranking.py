"""Study 1: does angular distance tell the blocks that can be pruned from those that cannot?

    python studies/block_ranking.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl

Half of the channels go from a few blocks only: those with the least distance, those with the
most (with and without the first block), or as many drawn by chance. Then each block is pruned
alone, and left out alone, and every distance's rank correlation with the rise of the loss is
taken. Prints Markdown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cfsp.calibration.accumulators import DISTANCES
from cfsp.calibration.statistics import Statistics
from conditions import calibrated, opened, parser_of_model
from damage import damage_of, rank_correlation
from results import Results, table
from subject import Subject

SPARSITY = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("block_ranking", __doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[5, 10], help="blocks to prune")
    parser.add_argument("--draws", type=int, default=3, help="random groups of each size")
    parser.add_argument(
        "--alone-windows", type=int, default=2, help="windows to measure each block alone on"
    )
    args = parser.parse_args(arguments)
    subject, results = opened(args, sparsity=SPARSITY, alone_windows=args.alone_windows)
    statistics = calibrated(args, subject)
    texts = list(subject.texts)
    dense = results.measure({"what": "dense"}, lambda: subject.quality(subject.model))
    groups(subject, statistics, results, args.groups, args.draws)
    alone(subject.on_first(args.alone_windows), statistics, results)
    print(f"\ndense: { {text: dense[text] for text in texts} }\n")
    print(table([r for r in results.rows if r["what"] == "group"], ["size", "blocks"], texts, 2))
    print(f"\n{correlations(results)}")


def groups(
    subject: Subject, statistics: Statistics, results: Results, sizes: Sequence[int], draws: int
) -> None:
    """Prune the blocks that angular distance calls least and most important, and random ones."""
    distance_L = statistics.distances("angular")
    order = sorted(range(len(distance_L)), key=lambda block: distance_L[block])
    for size in sizes:
        chosen = {("least important", 0): order[:size], ("most important", 0): order[-size:]}
        # The first block turned out to be a case of its own.
        chosen["most important but the first", 0] = [b for b in order if b > 0][-size:]
        for seed in range(draws):
            chosen["random", seed] = random.Random(seed).sample(order, size)
        for (blocks, seed), indices in chosen.items():
            results.measure(
                {"what": "group", "size": size, "blocks": blocks, "seed": seed},
                lambda indices=indices: {
                    "indices": sorted(indices),
                    **subject.quality_of_some(statistics, SPARSITY, indices),
                },
            )


def alone(subject: Subject, statistics: Statistics, results: Results) -> None:
    """Prune each block alone, and leave each out alone."""
    before = subject.quality(subject.model)
    for block in range(len(statistics.blocks)):
        results.measure(
            {"what": "alone", "block": block},
            lambda block=block: damage_of(subject, statistics, block, SPARSITY, before),
        )


def correlations(results: Results) -> str:
    """Return the rank correlation of every distance with the rise of the loss, as Markdown."""
    rows = [row for row in results.rows if row["what"] == "alone"]
    columns = {
        "pruned": ("pruned", rows),
        "left out": ("left out", rows),
        "pruned, first block aside": ("pruned", rows[1:]),
        "left out, first block aside": ("left out", rows[1:]),
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
