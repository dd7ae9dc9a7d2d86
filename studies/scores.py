"""Studies 2 and 3: which score of a channel, and which distance of a block, keeps most quality?

    python studies/scores.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl

Study 2: every score of channels, with widths by angular distance. Study 3: every distance of
blocks, and the same width everywhere, with channels by relative importance. Without repair, so
that it hides nothing. Each seed draws other calibration windows. Prints Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.calibration.accumulators import DISTANCES
from cfsp.importance.fine import CHANNEL_METRICS
from cfsp.planning import DEFAULT_BLOCK_METRIC, DEFAULT_CHANNEL_METRIC, Criterion
from conditions import calibration_text, opened, parser_of_model
from results import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("scores", __doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--seeds", type=int, default=2, help="draws of calibration windows")
    args = parser.parse_args(arguments)
    subject, results = opened(args)
    criteria = _criteria()
    for seed in range(args.seeds):
        statistics = subject.calibrate(calibration_text(args, seed))
        for sparsity in args.sparsity:
            for criterion in criteria:
                results.measure(
                    {
                        "blocks": criterion.block_metric,
                        "channels": criterion.channel_metric,
                        "sparsity": sparsity,
                        "seed": seed,
                    },
                    lambda statistics=statistics, sparsity=sparsity, criterion=criterion: (
                        subject.quality_of(subject.plan(statistics, sparsity, criterion))
                    ),
                )
    for study, key in ((2, "channels"), (3, "blocks")):
        other, default = {
            "channels": ("blocks", DEFAULT_BLOCK_METRIC),
            "blocks": ("channels", DEFAULT_CHANNEL_METRIC),
        }[key]
        rows = [row for row in results.rows if row[other] == default]
        print(f"\nstudy {study}\n\n{table(rows, ['sparsity', key], list(subject.texts))}")


def _criteria() -> list[Criterion]:
    """Return all criteria that differ from the default in one half, the default first."""
    found = [Criterion(DEFAULT_BLOCK_METRIC, channels) for channels in CHANNEL_METRICS]
    found += [Criterion(blocks, DEFAULT_CHANNEL_METRIC) for blocks in (*DISTANCES, "uniform")]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
