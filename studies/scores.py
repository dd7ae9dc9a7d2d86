"""Studies 2 and 3: which score of a channel, and which distance of a block, keeps most quality?

    python studies/run.py 2 --texts DIR
    python studies/run.py 3 --texts DIR

Study 2: every score of channels, and channels drawn by chance, with widths by angular distance.
Study 3: every distance of blocks, and the same width everywhere, with channels by relative
importance. Without repair, so that it hides nothing. Each seed draws other calibration windows.
Prints Markdown: perplexities, and how they differ from the default's on the same windows.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence

from cfsp.settings import (
    CHANNEL_METRICS,
    DEFAULT_BLOCK_METRIC,
    DEFAULT_CHANNEL_METRIC,
    DISTANCES,
    Criterion,
)
from conditions import parser_of_model
from results import Row, table
from study import Study

RANDOM = "random"
BLOCK_METRICS = (*DISTANCES, "uniform")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(arguments)
    study = Study(args)
    dense = study.results.measure(
        {"what": "dense"}, lambda: study.subject.quality(study.subject.model)
    )
    rows: list[Row] = []
    for seed in range(args.seeds):
        for sparsity in args.sparsity:
            for criterion in criteria(args.channels, args.blocks):
                key = _key(criterion, sparsity, seed)
                rows.append(study.results.measure(key, _pruned, study, criterion, sparsity, seed))
            if RANDOM in args.channels:
                rows += by_chance(study, sparsity, seed)
    print(f"\ndense: {' / '.join(f'{dense[text]:.1f}' for text in study.texts)}")
    print_tables(rows, study.texts)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_model("scores", __doc__.splitlines()[0])
    found.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.2])
    found.add_argument("--seeds", type=int, default=2, help="draws of calibration windows")
    found.add_argument("--draws", type=int, default=3, help="of channels by chance")
    for name, known in (("channels", CHANNEL_METRICS), ("blocks", BLOCK_METRICS)):
        found.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), help="besides the default"
        )
    return found


def criteria(channels: Iterable[str], blocks: Iterable[str]) -> list[Criterion]:
    """Return the default, then all that differ from it in one half."""
    found = [Criterion()]
    found += [Criterion(DEFAULT_BLOCK_METRIC, metric) for metric in channels if metric != RANDOM]
    found += [Criterion(metric, DEFAULT_CHANNEL_METRIC) for metric in blocks]
    return list(dict.fromkeys(found))


def _pruned(study: Study, criterion: Criterion, sparsity: float, seed: int) -> dict[str, float]:
    plan = study.subject.plan(study.statistics(seed), sparsity, criterion)
    return study.subject.quality_of(plan)


def by_chance(study: Study, sparsity: float, seed: int) -> list[Row]:
    """Prune to the widths of the default, channels drawn by chance."""
    draws = study.args.draws
    key = _key(Criterion(DEFAULT_BLOCK_METRIC, RANDOM), sparsity, seed)
    return [
        study.results.measure(
            {**key, "draw": draw}, _drawn, study, sparsity, seed, draws * seed + draw
        )
        for draw in range(draws)
    ]


def _drawn(study: Study, sparsity: float, seed: int, seed_of_draw: int) -> dict[str, float]:
    blocks = study.subject.plan(study.statistics(seed), sparsity).blocks
    generator = random.Random(seed_of_draw)
    kept = {
        index: sorted(generator.sample(range(block.width), block.kept_width))
        for index, block in enumerate(blocks)
    }
    return study.subject.quality_masked(kept)


def _key(criterion: Criterion, sparsity: float, seed: int) -> Row:
    return {
        "blocks": criterion.block_metric,
        "channels": criterion.channel_metric,
        "sparsity": sparsity,
        "seed": seed,
    }


def print_tables(rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Print perplexities, and what they are above the default's, for each study that has rows."""
    for what, fixed, default in (
        ("channels", "blocks", DEFAULT_BLOCK_METRIC),
        ("blocks", "channels", DEFAULT_CHANNEL_METRIC),
    ):
        chosen = [row for row in rows if row[fixed] == default]
        if len({row[what] for row in chosen}) < 2:
            continue
        by = ["sparsity", what]
        print(f"\nperplexity\n\n{table(chosen, by, texts)}")
        if len({row["seed"] for row in chosen}) > 1:
            print(
                f"\npercent above the default\n\n{table(above_default(chosen, texts), by, texts)}"
            )


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


if __name__ == "__main__":
    main()
