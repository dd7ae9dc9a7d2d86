"""Studies 2 and 3: which score of a channel, and which distance of a block, keeps most quality?

    python studies/scores.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl

Study 2: every score of channels, and channels drawn by chance, with widths by angular distance.
Study 3: every distance of blocks, and the same width everywhere, with channels by relative
importance. Without repair, so that it hides nothing. Each seed draws other calibration windows.
Prints Markdown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cfsp.calibration.accumulators import DISTANCES
from cfsp.calibration.statistics import Statistics
from cfsp.importance.fine import CHANNEL_METRICS
from cfsp.planning import DEFAULT_BLOCK_METRIC, DEFAULT_CHANNEL_METRIC, Criterion
from conditions import calibrated, opened, parser_of_model
from results import Results, Row, table
from subject import Subject

RANDOM = "random"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("scores", __doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--seeds", type=int, default=2, help="draws of calibration windows")
    parser.add_argument("--draws", type=int, default=3, help="of channels by chance")
    args = parser.parse_args(arguments)
    subject, results = opened(args)
    results.measure({"what": "dense"}, lambda: subject.quality(subject.model))
    for seed in range(args.seeds):
        statistics = calibrated(args, subject, seed)
        for sparsity in args.sparsity:
            by_criteria(subject, statistics, results, sparsity, seed)
            by_chance(subject, statistics, results, sparsity, seed, args.draws)
    for study, key in ((2, "channels"), (3, "blocks")):
        other, default = {
            "channels": ("blocks", DEFAULT_BLOCK_METRIC),
            "blocks": ("channels", DEFAULT_CHANNEL_METRIC),
        }[key]
        rows = [row for row in results.rows if row.get(other) == default]
        print(f"\nstudy {study}\n\n{table(rows, ['sparsity', key], list(subject.texts))}")


def by_criteria(
    subject: Subject, statistics: Statistics, results: Results, sparsity: float, seed: int
) -> None:
    """Prune by all criteria that differ from the default in one half, the default first."""
    criteria = [
        Criterion(DEFAULT_BLOCK_METRIC, channels)
        for channels in CHANNEL_METRICS
        if channels != RANDOM
    ]
    criteria += [Criterion(blocks, DEFAULT_CHANNEL_METRIC) for blocks in (*DISTANCES, "uniform")]
    for criterion in dict.fromkeys(criteria):
        results.measure(
            _key(criterion, sparsity, seed),
            lambda criterion=criterion: subject.quality_of(
                subject.plan(statistics, sparsity, criterion)
            ),
        )


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
