"""Study 7: how much calibration text is enough, which text, and how stable is the plan?

    python studies/stability.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --data python-docs --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl --samples 128

Of each text `--samples` windows pass the model once. Statistics are sums over windows, so any
part of them is a calibration of its own: disjoint parts of 1, 2, 4, ... windows are what other
seeds would draw. For each size: the overlap of the plans of two disjoint parts (channels that both
keep, of those that either keeps), with the widths of blocks too; and the perplexity of the first
few parts. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from cfsp.calibration.statistics import BlockStatistics, Statistics
from cfsp.pruning_plan import PruningPlan
from cfsp.settings import CalibrationText, Compute
from cfsp.stages import calibrate_windows
from conditions import opened, parser_of_model
from results import Results, table
from subject import Subject, label

# Pairs of plans are compared, so this many parts of one size are enough.
MOST_PARTS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("stability", __doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--parts", type=int, default=2, help="parts of each size to prune by")
    parser.add_argument(
        "--judge-every", type=int, default=4, help="prune by 1 window, so many, its square, ..."
    )
    args = parser.parse_args(arguments)
    subject, results = opened(args, sparsity=args.sparsity)
    of_text = {}
    for name in args.data:
        windows = one_by_one(subject, CalibrationText((name,), args.samples, args.seqlen))
        plans = plans_by_size(subject, windows, args.sparsity)
        of_text[label(name)] = plans
        stability(results, label(name), plans)
    between_texts(results, of_text)
    quality(args, subject, results, of_text)
    print_tables(results, list(subject.texts))


def one_by_one(subject: Subject, text: CalibrationText) -> list[Statistics]:
    """Return the statistics of each window alone."""
    windows = text.draw(subject.tokenizer)
    engine = Compute().engine(subject.source)
    return [
        calibrate_windows(
            subject.source, replace(windows, tokens_NT=window_T[None]), engine, text.seed
        )
        for window_T in windows.tokens_NT
    ]


def plans_by_size(
    subject: Subject, windows: Sequence[Statistics], sparsity: float
) -> dict[int, list[PruningPlan]]:
    """Return the plans of disjoint parts of the windows, by the number of windows of a part."""
    plans: dict[int, list[PruningPlan]] = {}
    size = 1
    while 2 * size <= len(windows):
        starts = range(0, len(windows) - size + 1, size)[:MOST_PARTS]
        parts = [added(windows[start : start + size]) for start in starts]
        plans[size] = [subject.plan(part, sparsity) for part in parts]
        size *= 2
    return plans


def added(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several windows together."""

    def block(blocks: Sequence[BlockStatistics]) -> BlockStatistics:
        return BlockStatistics(
            {name: sum(b.distance_sums[name] for b in blocks) for name in blocks[0].distance_sums},
            sum(b.sum_F for b in blocks),
            sum(b.sum_of_squares_F for b in blocks),
            sum(b.tokens for b in blocks),
        )

    return replace(
        parts[0], blocks=tuple(map(block, zip(*(part.blocks for part in parts), strict=True)))
    )


def overlap(first: PruningPlan, second: PruningPlan) -> float:
    """Return the channels that both plans keep as a fraction of those that either keeps."""
    kept = [
        {(index, channel) for index, block in enumerate(plan.blocks) for channel in block.kept}
        for plan in (first, second)
    ]
    return len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def moved(first: PruningPlan, second: PruningPlan) -> float:
    """Return the fraction of all kept channels that widths differ by."""
    pairs = zip(first.kept_widths, second.kept_widths, strict=True)
    return sum(abs(a - b) for a, b in pairs) / 2 / sum(first.kept_widths)


def stability(results: Results, text: str, plans: dict[int, list[PruningPlan]]) -> None:
    """Compare the plans of disjoint parts of the same size."""
    for size, of_size in plans.items():
        pairs = list(combinations(of_size, 2))
        overlaps = [overlap(*pair) for pair in pairs]
        results.measure(
            {"what": "stability", "text": text, "size": size},
            lambda pairs=pairs, overlaps=overlaps: {
                "pairs": len(pairs),
                "overlap": round(fmean(overlaps), 4),
                "lowest": round(min(overlaps), 4),
                "widths": round(fmean(moved(*pair) for pair in pairs), 4),
            },
        )


def between_texts(results: Results, of_text: dict[str, dict[int, list[PruningPlan]]]) -> None:
    """Compare the plans of different texts, at the largest size."""
    for (first, plans), (second, others) in combinations(of_text.items(), 2):
        size = max(plans)
        pairs = [(a, b) for a in plans[size] for b in others[size]]
        results.measure(
            {"what": "texts", "first": first, "second": second, "size": size},
            lambda pairs=pairs: {
                "overlap": round(fmean(overlap(*pair) for pair in pairs), 4),
                "widths": round(fmean(moved(*pair) for pair in pairs), 4),
            },
        )


def quality(
    args: argparse.Namespace,
    subject: Subject,
    results: Results,
    of_text: dict[str, dict[int, list[PruningPlan]]],
) -> None:
    """Measure what the plans of some sizes leave of the model."""
    for part in range(args.parts):
        for text, plans in of_text.items():
            for size in _judged(max(plans), args.judge_every):
                plan = plans[size][part]
                results.measure(
                    {"what": "quality", "text": text, "size": size, "part": part},
                    lambda plan=plan: subject.quality_of(plan),
                )


def _judged(largest: int, factor: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= factor


def print_tables(results: Results, texts: Sequence[str]) -> None:
    """Print stability, the overlap between texts, and quality."""
    for what, by, values, digits in (
        ("stability", ["text", "size"], ["overlap", "lowest", "widths"], 3),
        ("texts", ["first", "second", "size"], ["overlap", "widths"], 3),
        ("quality", ["text", "size"], texts, 1),
    ):
        rows = [row for row in results.rows if row["what"] == what]
        print(f"\n{what}\n\n{table(rows, by, values, digits)}")


if __name__ == "__main__":
    main()
