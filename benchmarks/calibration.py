"""What calibration costs, as a ratio to a plain forward pass over the same tokens.

    python benchmarks/calibration.py --data DIR/wikitext2/validation.parquet --samples 32

Plain is transformers' own forward of the loaded base model (no language-model head: calibration
needs none), without gradients, in batches of as many tokens. Calibration reads the weights from
disk, and repair solves and writes the repaired matrices; both are counted. Runs take turns;
the figure is the median of the ratios within a round. Processor time, of all threads together,
is told beside that of the clock: it can be compared where other programs run.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.decide import decide
from cfsp.job import Job
from cfsp.repair import ridge_pass
from cfsp.repair.ridge import RidgeSolution, repair_down_projection
from cfsp.settings import (
    DEFAULT_SEQLEN,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    PruneSettings,
    options_of,
)
from cfsp.streaming.block_stream import TOKENS_IN_BATCH
from cfsp.streaming.runtime import runtime_of, versions
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.drawing import draw_text
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", action="append")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=DEFAULT_SEQLEN)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sparsity", type=float, default=0.5)
    metrics = options_of(Criterion)["block_metric"].choices
    parser.add_argument("--block-metric", choices=metrics, default="auto")
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    text = CalibrationText(tuple(args.data or ["python-docs"]), args.samples, args.seqlen)
    compute = Compute(dtype=args.dtype)
    runtime = runtime_of(compute, source)
    tokenizer = load_tokenizer(source.directory)
    windows = draw_text(text, tokenizer)
    model = load(args.model, dtype=runtime.dtype, device=runtime.device)
    criterion = Criterion(block_metric=args.block_metric)
    settings = PruneSettings(Budget(args.sparsity), criterion, text, compute)
    nowhere = WorkDir(Path())
    job = Job(source, settings, lambda: tokenizer, lambda: windows, runtime, nowhere)
    solving: list[float] = []

    def timed_solve(*arguments: Any, **options: Any) -> RidgeSolution:
        begun = time.process_time()
        solution = repair_down_projection(*arguments, **options)
        solving[-1] += time.process_time() - begun
        return solution

    def repair() -> None:
        solving.append(0.0)
        with (
            tempfile.TemporaryDirectory() as work,
            patch.object(ridge_pass, "repair_down_projection", timed_solve),
        ):
            decide(replace(job, work_dir=WorkDir(Path(work))))

    runs: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain_forward(model, windows),
        "calibrate": lambda: calibrate(job, windows),
        "calibrate and repair": repair,
    }
    clocks = {"seconds": time.perf_counter, "processor seconds": time.process_time}
    spent = {clock: {name: list[float]() for name in runs} for clock in clocks}
    plain_forward(model, Windows(windows.tokens_NT[:4], {}))
    for _ in range(args.rounds):
        for name, run in runs.items():
            begun = {clock: now() for clock, now in clocks.items()}
            run()
            for clock, now in clocks.items():
                spent[clock][name].append(now() - begun[clock])
    spent["processor seconds"]["of that, solving"] = solving

    print(
        f"{args.model}, {windows.tokens_NT.numel()} tokens in windows of {args.seqlen}, "
        f"{runtime.dtype} on {runtime.device}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, {versions()}; {args.rounds} rounds"
    )
    for clock, by_name in spent.items():
        print(f"\n| | {clock} (min, median, max) | ratio to plain (median) |\n|---|---|---:|")
        for name, values in by_name.items():
            ratios = [v / p for v, p in zip(values, by_name["plain forward"], strict=True)]
            spread = f"{min(values):.1f}, {median(values):.1f}, {max(values):.1f}"
            print(f"| {name} | {spread} | {median(ratios):.2f} |")


def plain_forward(model: PreTrainedModel, windows: Windows) -> None:
    """Run the base model over all windows."""
    batch = max(1, TOKENS_IN_BATCH // windows.tokens_NT.shape[1])
    with torch.inference_mode():
        for tokens_BT in torch.split(windows.tokens_NT, batch):
            model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)


if __name__ == "__main__":
    main()
