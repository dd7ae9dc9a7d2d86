"""How little text the coarse importance needs: widths from few windows against all.

    python benchmarks/coarse_windows.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --samples 64

One calibration of all windows is the reference. For each smaller number of windows: the largest
and mean difference of the kept fraction of a block before rounding, the number of blocks whose
width differs, and the share of all channels in those differences. Several disjoint subsets of
each size give the spread. Prints Markdown.
"""

from __future__ import annotations

import argparse
from statistics import fmean

from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.engine.compute import engine_of
from cfsp.planning.make import BlockWidths, plan_widths
from cfsp.settings import Budget, CalibrationText, Compute, Criterion
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", action="append")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--subsets", type=int, default=3)
    args = parser.parse_args()
    source = open_checkpoint(args.model)
    text = CalibrationText(tuple(args.data or ["python-docs"]), args.samples)
    windows = text.draw(load_tokenizer(source.directory))
    engine = engine_of(Compute(), source)

    def widths(statistics: Statistics) -> BlockWidths:
        return plan_widths(source, statistics, Budget(args.sparsity), Criterion())

    reference = widths(calibrate(source, windows, engine, 0))
    total = sum(reference.kept_L)
    print(f"{args.model}, reference {args.samples} windows of 1024, sparsity {args.sparsity}\n")
    print("| windows | largest relative change of a distance | blocks that differ | channels |")
    print("|---:|---:|---:|---:|")
    size = 1
    while size * args.subsets <= args.samples:
        changes, blocks, moved = [], [], []
        for subset in range(args.subsets):
            # A stride spreads each subset over all texts; offsets keep subsets disjoint.
            stride = len(windows.tokens_NT) // size
            offset = subset * (stride // args.subsets)
            part = Windows(windows.tokens_NT[offset::stride][:size], {})
            found = widths(calibrate(source, part, engine, 0))
            pairs = list(zip(found.distance_L, reference.distance_L, strict=True))
            changes.append(max(abs(a - b) / b for a, b in pairs))
            gaps = [abs(a - b) for a, b in zip(found.kept_L, reference.kept_L, strict=True)]
            blocks.append(sum(gap > 0 for gap in gaps))
            moved.append(sum(gaps) / 2 / total)
        print(f"| {size} | {max(changes):.1%} | {fmean(blocks):.1f} | {fmean(moved):.2%} |")
        size *= 2


if __name__ == "__main__":
    main()
