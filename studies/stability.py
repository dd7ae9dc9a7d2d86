"""Study 7: how much calibration text is enough, which text, and how stable is the plan?

    python studies/run.py 7 --texts DIR

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
from functools import cached_property
from itertools import combinations
from statistics import fmean

from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import BlockStatistics, Statistics, UnitStatistics
from cfsp.engine.compute import engine_of
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import CalibrationText, Compute
from cfsp.text.drawing import draw_text
from conditions import parser_of_model
from results import Row, table
from study import Study
from subject import Subject, label

# Pairs of plans are compared, so this many parts of one size are enough.
MOST_PARTS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(arguments)
    study = Study(args, sparsity=args.sparsity)
    texts = [Text(study, name) for name in args.data]
    for text in texts:
        stability(study, text)
    between_texts(study, texts)
    quality(study, texts)
    print_tables(study)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_model("stability", __doc__.splitlines()[0])
    found.add_argument("--sparsity", type=float, default=0.5)
    found.add_argument("--parts", type=int, default=2, help="parts of each size to prune by")
    found.add_argument(
        "--judge-every",
        type=int,
        default=4,
        help="prune by 1 window, so many, its square, ..., and by half of all",
    )
    return found


class Text:
    """A calibration text, whose windows pass the model when first needed.

    Attributes:
        label: its name.
    """

    def __init__(self, study: Study, name: str) -> None:
        self.label = label(name)
        self._study, self._name = study, name

    @cached_property
    def plans(self) -> dict[int, list[PruningPlan]]:
        """The plans of disjoint parts of the windows, by the number of windows of a part."""
        args, subject = self._study.args, self._study.subject
        text = CalibrationText((self._name,), args.samples, args.seqlen)
        windows = one_by_one(subject, text)
        return {
            size: plans_of_parts(subject, windows, size, args.sparsity)
            for size in sizes(args.samples)
        }


def sizes(samples: int) -> list[int]:
    """Return how many windows a part can have, so that there are two: 1, 2, 4, ..."""
    return [1 << power for power in range((samples // 2).bit_length())]


def one_by_one(subject: Subject, text: CalibrationText) -> list[Statistics]:
    """Return the statistics of each window alone."""
    windows = draw_text(text, subject.tokenizer)
    engine = engine_of(Compute(), subject.source)
    return [
        calibrate(
            subject.source, replace(windows, tokens_NT=window_T[None]), engine, seed=text.seed
        )
        for window_T in windows.tokens_NT
    ]


def plans_of_parts(
    subject: Subject, windows: Sequence[Statistics], size: int, sparsity: float
) -> list[PruningPlan]:
    """Return the plans of disjoint parts of some windows each."""
    starts = range(0, len(windows) - size + 1, size)[:MOST_PARTS]
    parts = [added(windows[start : start + size]) for start in starts]
    return [subject.plan(part, sparsity) for part in parts]


def added(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several windows together."""

    def block(blocks: Sequence[BlockStatistics]) -> BlockStatistics:
        return BlockStatistics(
            {name: sum(b.distance_sums[name] for b in blocks) for name in blocks[0].distance_sums},
            sum(b.tokens for b in blocks),
        )

    def unit(units: Sequence[UnitStatistics]) -> UnitStatistics:
        return UnitStatistics(
            units[0].block,
            sum(u.sum_F for u in units),
            sum(u.sum_of_squares_F for u in units),
            sum(u.tokens for u in units),
        )

    return replace(
        parts[0],
        blocks=tuple(map(block, zip(*(part.blocks for part in parts), strict=True))),
        units=tuple(map(unit, zip(*(part.units for part in parts), strict=True))),
    )


def overlap(first: PruningPlan, second: PruningPlan) -> float:
    """Return the channels that both plans keep as a fraction of those that either keeps."""
    kept = [
        {(index, channel) for index, unit in enumerate(plan.units) for channel in unit.kept}
        for plan in (first, second)
    ]
    return len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def moved(first: PruningPlan, second: PruningPlan) -> float:
    """Return the fraction of all kept channels that widths differ by."""
    pairs = zip(first.kept_widths, second.kept_widths, strict=True)
    return sum(abs(a - b) for a, b in pairs) / 2 / sum(first.kept_widths)


def stability(study: Study, text: Text) -> None:
    """Compare the plans of disjoint parts of the same size."""
    for size in sizes(study.args.samples):
        study.results.measure(
            {"what": "stability", "text": text.label, "size": size}, _compared, text, size
        )


def _compared(text: Text, size: int) -> Row:
    pairs = list(combinations(text.plans[size], 2))
    overlaps = [overlap(*pair) for pair in pairs]
    return {
        "pairs": len(pairs),
        "overlap": round(fmean(overlaps), 4),
        "lowest": round(min(overlaps), 4),
        "widths": round(fmean(moved(*pair) for pair in pairs), 4),
    }


def between_texts(study: Study, texts: Sequence[Text]) -> None:
    """Compare the plans of different texts, at the largest size."""
    size = sizes(study.args.samples)[-1]
    for first, second in combinations(texts, 2):
        key = {"what": "texts", "first": first.label, "second": second.label, "size": size}
        study.results.measure(key, _across, first, second, size)


def _across(first: Text, second: Text, size: int) -> Row:
    pairs = [(a, b) for a in first.plans[size] for b in second.plans[size]]
    return {
        "overlap": round(fmean(overlap(*pair) for pair in pairs), 4),
        "widths": round(fmean(moved(*pair) for pair in pairs), 4),
    }


def quality(study: Study, texts: Sequence[Text]) -> None:
    """Measure what the plans of some sizes leave of the model."""
    largest = sizes(study.args.samples)[-1]
    for part in range(study.args.parts):
        for text in texts:
            for size in judged(largest, study.args.judge_every):
                key = {"what": "quality", "text": text.label, "size": size, "part": part}
                study.results.measure(key, _pruned, study, text, size, part)


def _pruned(study: Study, text: Text, size: int, part: int) -> dict[str, float]:
    return study.subject.quality_of(text.plans[size][part])


def judged(largest: int, factor: int) -> Iterator[int]:
    """Give 1, the factor, its square, ..., and the largest."""
    size = 1
    while size < largest:
        yield size
        size *= factor
    yield largest


def print_tables(study: Study) -> None:
    """Print stability, the overlap between texts, and quality."""
    for what, by, values, digits in (
        ("stability", ["text", "size", "pairs"], ["overlap", "lowest", "widths"], 3),
        ("texts", ["first", "second", "size"], ["overlap", "widths"], 3),
        ("quality", ["text", "size"], study.texts, 1),
    ):
        rows = [row for row in study.results.rows if row["what"] == what]
        print(f"\n{what}\n\n{table(rows, by, values, digits)}")


if __name__ == "__main__":
    main()
