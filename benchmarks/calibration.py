"""What calibration costs, as a ratio to a plain forward pass over the same tokens.

    python benchmarks/calibration.py --data DIR/wikitext2/validation.parquet --samples 32

Plain is transformers' own forward of the loaded base model (no language-model head: calibration
needs none), without gradients, in batches of as many tokens. Calibration reads the weights from
disk, and restoration solves and writes the repaired matrices; both are counted. Runs take turns;
the figure is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from cfsp.repair.decision import decide_and_restore
from transformers import PreTrainedModel

from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.engine.block_stream import TOKENS_IN_BATCH
from cfsp.engine.compute import engine_of
from cfsp.engine.versions import versions
from cfsp.engine.workplace import Workplace
from cfsp.settings import DEFAULT_SEQLEN, Budget, CalibrationText, Compute, PruneSettings
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
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    text = CalibrationText(tuple(args.data or ["python-docs"]), args.samples, args.seqlen)
    compute = Compute(dtype=args.dtype)
    engine = engine_of(compute, source)
    windows = text.draw(load_tokenizer(source.directory))
    model = load(args.model, dtype=engine.dtype, device=engine.device)
    settings = PruneSettings(Budget(args.sparsity), text=text, compute=compute)

    def restore() -> None:
        with tempfile.TemporaryDirectory() as work:
            decide_and_restore(source, windows, settings, engine, Workplace(Path(work)))

    runs: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain_forward(model, windows),
        "calibrate": lambda: calibrate(source, windows, engine, text.seed),
        "calibrate and restore": restore,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    plain_forward(model, Windows(windows.tokens_NT[:4], {}))
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    print(
        f"{args.model}, {windows.tokens_NT.numel()} tokens in windows of {args.seqlen}, "
        f"{engine.dtype} on {engine.device}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, {versions()}; {args.rounds} rounds\n"
    )
    print("| | seconds (min, median, max) | ratio to plain (median of rounds) |\n|---|---|---:|")
    for name, values in seconds.items():
        ratios = [v / p for v, p in zip(values, seconds["plain forward"], strict=True)]
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
