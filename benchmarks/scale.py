"""What pruning a large model costs: peak memory, seconds by stage, bytes read and written.

    python benchmarks/scale.py --shape llama-3-8b --samples 8 --seqlen 1024 --directory SCRATCH
    python benchmarks/scale.py --shape llama-3.2-1b --sweep --directory SCRATCH

Makes a checkpoint of the shape with random weights (`make_checkpoint.py`; an existing one is used
with --checkpoint), prunes half of its FFN channels in a process of its own, and removes all of it
again. The sweep does so for several depths at the same text and for several amounts of text at
the same depth. Memory is the peak of the pruning process's resident set; bytes are what
it read and wrote through the system (page cache included) and, in brackets, what the disk saw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.checkpoint.reading import Checkpoint
from cfsp.streaming.runtime import versions
from make_checkpoint import SHAPES, make_checkpoint

# Runs a command and adds what the system knows of the process.
_CHILD = """
import json, pathlib, sys
from cfsp.cli import main
from cfsp.streaming.memory import peak_rss_bytes
status = main(sys.argv[1:])
pairs = (line.partition(":") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
io = {key: int(value) for key, _, value in pairs}
print(json.dumps({"io": io, "peak": peak_rss_bytes()}), file=sys.stderr)
sys.exit(status)
"""

# Beyond embeddings, two blocks and hidden states: interpreter, libraries, sums, one solve.
ALLOWANCE = 1_500_000_000


@dataclass(frozen=True)
class Run:
    """One pruning."""

    blocks: int
    tokens: int
    hidden_bytes: int
    limit: int  # embeddings + two blocks + hidden states + 1.5 GB
    wall: float  # seconds of the whole process
    report: dict[str, Any]  # what `cfsp prune --json` printed
    peak: int  # highest resident memory in bytes
    io: dict[str, int]  # /proc/self/io


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=tuple(SHAPES))
    parser.add_argument("--blocks", type=int, help="how many blocks (default: all)")
    parser.add_argument("--checkpoint", type=Path, help="use this one, and leave it there")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true", help="over depth and tokens")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repair", default="ridge", choices=("ridge", "none"))
    parser.add_argument("--memory-budget", help="as for cfsp prune")
    parser.add_argument("--directory", type=Path, help="for the checkpoints; needs room for both")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    args = parser.parse_args()
    runs = list(_sweep(args) if args.sweep else _single(args))
    _print(args, runs)
    if args.json:
        args.json.write_text(json.dumps([vars(run) for run in runs], indent=2) + "\n")


def _single(args: argparse.Namespace) -> Iterator[Run]:
    with _checkpoint(args, args.blocks) as source:
        yield measure(args, source, args.samples)


def _sweep(args: argparse.Namespace) -> Iterator[Run]:
    deepest = max(args.depths)
    for depth in args.depths:
        with _checkpoint(args, depth) as source:
            counts = args.windows if depth == deepest else [max(args.windows)]
            for windows in counts:
                yield measure(args, source, windows)


@contextmanager
def _checkpoint(args: argparse.Namespace, blocks: int | None) -> Iterator[Path]:
    if args.checkpoint and not args.sweep:
        yield args.checkpoint
        return
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="cfsp-scale-") as scratch:
        source = Path(scratch) / "dense"
        print(f"writing {args.shape} with {blocks or 'all'} blocks", file=sys.stderr)
        make_checkpoint(source, args.shape, blocks)
        yield source


def measure(args: argparse.Namespace, source: Path, windows: int) -> Run:
    """Prune in a child process and return what it took."""
    checkpoint = Checkpoint(source)
    blocks, hidden = checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size
    print(f"pruning {blocks} blocks with {windows} x {args.seqlen} tokens", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="cfsp-scale-") as scratch:
        argv = ["prune", str(source), "--sparsity", "0.5", "--data", args.data]
        argv += ["--samples", str(windows), "--seqlen", str(args.seqlen)]
        argv += ["--repair", args.repair, "--out", f"{scratch}/out", "--json"]
        argv += ["--set", "block_metric=angular"]  # sensitivity takes the whole model if it can
        if args.memory_budget:
            argv += ["--memory-budget", args.memory_budget]
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, *argv], capture_output=True, text=True, check=False
        )
        wall = time.perf_counter() - start
    if child.returncode:
        sys.exit(child.stderr)
    facts = json.loads(child.stderr.splitlines()[-1])
    hidden_bytes = windows * args.seqlen * hidden * 2
    sizes = sizes_of(checkpoint)
    limit = sizes["embeddings"] + 2 * sizes["block"] + hidden_bytes + ALLOWANCE
    return Run(
        blocks=blocks,
        tokens=windows * args.seqlen,
        hidden_bytes=hidden_bytes,
        limit=limit,
        wall=wall,
        report=json.loads(child.stdout),
        peak=facts["peak"],
        io=facts["io"],
    )


def sizes_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bytes of the largest block and of everything before the first block."""
    architecture = checkpoint.architecture

    def bytes_of(prefix: str) -> int:
        return sum(s.nbytes for name, s in checkpoint.specs.items() if name.startswith(prefix))

    blocks = [bytes_of(architecture.block_prefix(i)) for i in range(architecture.block_count)]
    base = bytes_of(f"{architecture.decoder}.")
    return {"block": max(blocks), "embeddings": base - sum(blocks)}


def _print(args: argparse.Namespace, runs: list[Run]) -> None:
    print(
        f"{args.shape} (random bfloat16 weights), half of the FFN channels removed, "
        f"--repair {args.repair}, windows of {args.seqlen} tokens; "
        f"{os.cpu_count()} CPUs, {platform.machine()}, {versions()}\n"
    )
    passes = list(runs[0].report["passes"])
    stages = [name for name in runs[0].report["seconds"] if name not in ("evaluate", *passes)]
    head = ["blocks", "tokens", "peak memory, GB", "limit, GB", "seconds in all"]
    head += [f"{name}, s" for name in (*stages, *passes)]
    head += ["microseconds per block and token", "total / compute", "read, GB", "written, GB"]
    print(f"| {' | '.join(head)} |\n|{'---:|' * len(head)}")
    for run in runs:
        seconds = run.report["seconds"]
        last = run.report["passes"][passes[-1]]
        row = [str(run.blocks), f"{run.tokens:,}", f"{run.peak / 1e9:.2f}"]
        row += [f"{run.limit / 1e9:.2f}", f"{run.wall:.1f}"]
        row += [f"{seconds[name]:.1f}" for name in stages]
        row += [f"{run.report['passes'][name]['total']:.1f}" for name in passes]
        row += [f"{last['total'] / run.blocks / run.tokens * 1e6:.1f}", f"{last['ratio']:.3f}"]
        row += [f"{run.io['rchar'] / 1e9:.2f} ({run.io['read_bytes'] / 1e9:.2f})"]
        row += [f"{run.io['wchar'] / 1e9:.2f} ({run.io['write_bytes'] / 1e9:.2f})"]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
