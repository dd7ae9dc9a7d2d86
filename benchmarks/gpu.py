"""All that is measured of a GPU, in one command of under 8 minutes and one JSON.

    python benchmarks/gpu.py --directory SCRATCH --out gpu.json
    python benchmarks/gpu.py --tiny        # a small shape on the CPU: does it run?

Makes a checkpoint of Llama 3 8B's shape with random weights (16 GB; `make_checkpoint.py`), then, on
128 windows of 1024 tokens: calibration alone, ridge repair at 20% and 50%, sequential repair at
50%. Each says its seconds by stage and pass and the peak of the device's memory. The dense model
and the first two are then timed against each other, prefill and decoding. What does not begin
within the limit is left out and is null. SCRATCH needs 55 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.reading import Checkpoint
from cfsp.pipeline import prune_checkpoint
from cfsp.settings import Budget, CalibrationText, Compute, Criterion, PruneSettings, Repair
from cfsp.speed.bench import bench
from cfsp.streaming.runtime import versions
from make_checkpoint import make_checkpoint


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: str = "llama-3-8b"
    blocks: int | None = None
    windows: int = 128
    seqlen: int = 1024
    device: str = "cuda"
    prompt: int = 2048
    new_tokens: int = 64
    rounds: int = 5
    timed: tuple[str, ...] = ("dense", "20", "50")


FULL = Size()
TINY = Size("smollm2-135m", 2, 8, 64, "cpu", 8, 2, 1, ("dense", "50"))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--directory", type=Path, help="for checkpoints, removed afterwards")
    parser.add_argument("--out", type=Path, help="write the JSON there too, after each stage")
    parser.add_argument("--limit", type=float, default=400, help="seconds; nothing begins later")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="cfsp-gpu-") as scratch:
        found = measure(TINY if args.tiny else FULL, Path(scratch), args.limit, args.out)
    print(json.dumps(found, indent=2))


def measure(size: Size, scratch: Path, limit: float, out: Path | None) -> dict[str, Any]:
    """Run all stages in an empty directory; after `limit` seconds no further one begins."""
    device = compute_device(size.device)
    is_cuda = device.type == "cuda"
    dense = scratch / "dense"
    stages: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: make_checkpoint(dense, size.shape, size.blocks, device=device),
        "calibrate": lambda: _prune(size, dense, scratch / "plan", 0.5, "none"),
        "ridge 20%": lambda: _prune(size, dense, scratch / "20", 0.2, "ridge"),
        "ridge 50%": lambda: _prune(size, dense, scratch / "50", 0.5, "ridge"),
        "sequential 50%": lambda: _prune(size, dense, scratch / "sequential", 0.5, "sequential"),
        "speed": lambda: _speed(size, scratch),
    }
    found: dict[str, Any] = {
        "shape": size.shape,
        "tokens": size.windows * size.seqlen,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": {},
    }
    started = time.monotonic()
    for name, run in stages.items():
        begun = time.monotonic()
        if begun - started > limit:
            found["stages"][name] = None
            continue
        print(f"{begun - started:.0f} s: {name}", file=sys.stderr)
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        result = run()
        found["stages"][name] = {
            "seconds": round(time.monotonic() - begun, 2),
            # Of tensors of this process.
            "peak_device_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
            "result": result,
        }
        found["seconds"] = round(time.monotonic() - started, 2)
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _settings(size: Size, sparsity: float, repair: Repair) -> PruneSettings:
    text = CalibrationText(("python-docs",), size.windows, size.seqlen)
    # Sensitivity would run the whole model; its cost is that of so many more windows.
    criterion = Criterion(block_metric="angular")
    return PruneSettings(Budget(sparsity), criterion, text, Compute(size.device), repair)


def _prune(size: Size, dense: Path, out: Path, sparsity: float, repair: Repair) -> dict[str, Any]:
    settings, dry_run = _settings(size, sparsity, repair), repair == "none"
    report = prune_checkpoint(Checkpoint(dense), out, settings, dry_run=dry_run)
    if repair == "sequential":  # as large as that with ridge repair: it is not timed
        shutil.rmtree(out)
    kept = ("seconds", "passes", "peak_rss_bytes", "parameters_before", "parameters_after")
    return {name: getattr(report, name) for name in kept}


def _speed(size: Size, scratch: Path) -> dict[str, Any]:
    models = [scratch / name for name in size.timed if (scratch / name).is_dir()]
    comparison = bench(
        models,
        prompt=size.prompt,
        new_tokens=size.new_tokens,
        rounds=size.rounds,
        device=size.device,
    )
    return comparison.to_json()


if __name__ == "__main__":
    main()
