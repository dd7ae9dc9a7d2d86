"""Studies 2 and 3: which score of a channel, and which distance of a block, keeps most quality?

    python studies/scores.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl

Study 2: every score of channels, and channels drawn by chance, with widths by angular distance.
Study 3: every distance of blocks, and the same width everywhere, with channels by relative
importance. Without repair, so that it hides nothing. Each seed draws other calibration windows.
Prints Markdown: perplexities, and how they differ from the default's on the same windows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from cfsp.calibration.accumulators import DISTANCES
from cfsp.calibration.statistics import Statistics
from cfsp.importance.fine import CHANNEL_METRICS
from cfsp.planning import DEFAULT_BLOCK_METRIC, DEFAULT_CHANNEL_METRIC, Criterion
from conditions import calibrated, opened, parser_of_model
from results import Results, Row, table
from subject import Subject

RANDOM = "random"
BLOCK_METRICS = (*DISTANCES, "uniform")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("scores", __doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--seeds", type=int, default=2, help="draws of calibration windows")
    parser.add_argument("--draws", type=int, default=3, help="of channels by chance")
    for name, known in (("channels", CHANNEL_METRICS), ("blocks", BLOCK_METRICS)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), help="besides the default"
        )
    args = parser.parse_args(arguments)
    subject, results = opened(args)
    results.measure({"what": "dense"}, lambda: subject.quality(subject.model))
    for seed in range(args.seeds):
        statistics = calibrated(args, subject, seed)
        for sparsity in args.sparsity:
            for criterion in criteria(args.channels, args.blocks):
                results.measure(
                    _key(criterion, sparsity, seed),
                    lambda criterion=criterion, sparsity=sparsity, statistics=statistics: (
                        subject.quality_of(subject.plan(statistics, sparsity, criterion))
                    ),
                )
            if RANDOM in args.channels:
                by_chance(subject, statistics, results, sparsity, seed, args.draws)
    for study, key in ((2, "channels"), (3, "blocks")):
        other, default = {
            "channels": ("blocks", DEFAULT_BLOCK_METRIC),
            "blocks": ("channels", DEFAULT_CHANNEL_METRIC),
        }[key]
        rows = [row for row in results.rows if row.get(other) == default]
        by, texts = ["sparsity", key], list(subject.texts)
        print(f"\nstudy {study}\n\n{table(rows, by, texts)}")
        print(f"\npercent above the default\n\n{table(above_default(rows, texts), by, texts)}")


def criteria(channels: Iterable[str], blocks: Iterable[str]) -> list[Criterion]:
    """Return the default, then all that differ from it in one half."""
    found = [Criterion()]
    found += [Criterion(DEFAULT_BLOCK_METRIC, metric) for metric in channels if metric != RANDOM]
    found += [Criterion(metric, DEFAULT_CHANNEL_METRIC) for metric in blocks]
    return list(dict.fromkeys(found))


def above_default(rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
    """Return by how many percent each perplexity is above the default's of the same seed.

    Plans of one seed saw the same windows, so that what the windows do to all of them cancels.
    """
    default = {
        (row["sparsity"], row["seed"]): row
        for row in rows
        if (row["blocks"], row["channels"]) == (DEFAULT_BLOCK_METRIC, DEFAULT_CHANNEL_METRIC)
    }
    pairs = [(row, default[row["sparsity"], row["seed"]]) for row in rows]
    return [
        {**row, **{text: 100 * (row[text] / base[text] - 1) for text in texts}}
        for row, base in pairs
        if row is not base
    ]


def by_chance(
    subject: Subject,
    statistics: Statistics,
    results: Results,
    sparsity: float,
    seed: int,
    draws: int,
) -> None:
    """Prune to the widths of the default, channels drawn by chance."""
    blocks = subject.plan(statistics, sparsity).blocks
    for draw in range(draws):
        generator = random.Random(draws * seed + draw)
        kept = {
            index: sorted(generator.sample(range(block.width), block.kept_width))
            for index, block in enumerate(blocks)
        }
        results.measure(
            {**_key(Criterion(DEFAULT_BLOCK_METRIC, RANDOM), sparsity, seed), "draw": draw},
            lambda kept=kept: subject.quality_masked(kept),
        )


def _key(criterion: Criterion, sparsity: float, seed: int) -> Row:
    return {
        "blocks": criterion.block_metric,
        "channels": criterion.channel_metric,
        "sparsity": sparsity,
        "seed": seed,
    }


if __name__ == "__main__":
    main()
