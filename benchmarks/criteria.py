"""Perplexity of every fine criterion, from one calibration.

    python benchmarks/criteria.py --data DIR/wikitext2/validation.parquet \
        --eval DIR/wikitext2/test.parquet --eval DIR/c4/validation.jsonl

Prunes a model in memory-sized steps: one calibration, then for every sparsity and criterion a
plan, a checkpoint in a temporary directory, and perplexity on every text. Prints Markdown.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.engine.versions import versions
from cfsp.pipeline import calibrate_source, prune_checkpoint
from cfsp.quality.evaluate import evaluate_models
from cfsp.settings import (
    CHANNEL_METRICS,
    REPAIRS,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    EvaluationText,
    PruneSettings,
)
from cfsp.text.tokenizers import load_tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--eval", action="append", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--multiple", type=int)
    parser.add_argument("--channel-metrics", nargs="+", default=list(CHANNEL_METRICS))
    parser.add_argument("--restore", default="none", choices=REPAIRS)
    args = parser.parse_args()

    texts = EvaluationText(tuple(args.eval), args.windows)
    text = CalibrationText(tuple(args.data), args.samples)
    compute = Compute()
    source = open_checkpoint(args.model)
    statistics = calibrate_source(source, load_tokenizer(source.directory), text, compute)
    print(
        f"{args.model}, calibrated on {statistics.record.sources}, perplexity on the first "
        f"{args.windows} windows of 1024; torch {torch.__version__}, "
        f"transformers {versions()['transformers']}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {statistics.record.dtype}\n"
    )
    print("| FFN sparsity | block metric | channel metric | " + " | ".join(args.eval) + " |")
    print("|---|---|---|" + "---:|" * len(args.eval))
    dense = evaluate_models([args.model], texts, compute)[0]["perplexity"]
    cells = " | ".join(f"{v['value']:.1f}" for v in dense.values())
    print(f"| 0% | | dense | {cells} |", flush=True)
    for sparsity in args.sparsity:
        criteria = [Criterion("angular", metric) for metric in args.channel_metrics]
        criteria.append(Criterion("uniform", "activation"))
        for criterion in criteria:
            with tempfile.TemporaryDirectory() as directory:
                report = prune_checkpoint(
                    source,
                    Path(directory) / "pruned",
                    PruneSettings(
                        Budget(sparsity, multiple=args.multiple),
                        criterion,
                        text,
                        compute,
                        restore=args.restore,
                    ),
                    statistics=statistics,
                )
                result = evaluate_models([str(report.out)], texts, compute)[0]["perplexity"]
            cells = " | ".join(f"{v['value']:.1f}" for v in result.values())
            print(
                f"| {sparsity:.0%} | {criterion.block_metric} | {criterion.channel_metric} "
                f"| {cells} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
