"""What an FFN width costs that is no multiple of 32, 64, 128 or 256.

    python benchmarks/widths.py --hidden 4096 --around 7168 --dtype bfloat16

Times a gated FFN whose width is a multiple of 256, and its neighbours: adding 1, 2, 4, ... makes
widths whose largest power-of-two divisor is 1, 2, 4, ... Seconds per channel are compared to the
first width, in the same round; widths take turns in a fresh random order every round. Prints
Markdown. Above 1 means that the width is slower than its size says.

Shapes: D hidden, F channels, T tokens.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--around", type=int, default=7168, help="a multiple of 256")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.around % 256:
        parser.error(f"--around must be a multiple of 256, found {args.around}")

    steps = [1, 2, 4, 8, 16, 32, 64, 128]
    widths = [args.around, *(args.around + s for s in steps), *(args.around - s for s in steps)]
    dtype = getattr(torch, args.dtype)
    device = torch.device(args.device)
    ffns = {width: _ffn(args.hidden, width, dtype, device) for width in widths}
    order = random.Random(args.seed)
    columns = {}
    with torch.inference_mode():
        for tokens in args.tokens:
            act_TD = torch.randn(tokens, args.hidden, device=device).to(dtype)
            columns[tokens] = _rounds(ffns, act_TD, args.rounds, order)

    print(
        f"D {args.hidden}, {args.dtype}, {args.device}, {platform.machine()}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds: seconds "
        f"per channel relative to {args.around} (median, quartiles)\n"
    )
    head = " | ".join(f"{tokens} tokens" for tokens in args.tokens)
    print(f"| largest power of two | widths | {head} |")
    print("|---:|---|" + "---:|" * len(args.tokens))
    for step in [*steps, 256]:
        pair = [args.around] if step == 256 else [args.around - step, args.around + step]
        cells = []
        for tokens in args.tokens:
            reference = columns[tokens][args.around]
            values = [
                (timed / width) / (first / args.around)
                for width in pair
                for timed, first in zip(columns[tokens][width], reference, strict=True)
            ]
            low, _, high = quantiles(values, n=4)
            cells.append(f"{median(values):.3f} ({low:.3f} - {high:.3f})")
        print(f"| {step} | {', '.join(map(str, pair))} | {' | '.join(cells)} |")
    for tokens in args.tokens:
        seconds = median(columns[tokens][args.around])
        print(f"\n{tokens} tokens at {args.around}: {1000 * seconds:.2f} ms")


def _ffn(hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).uniform_(-0.02, 0.02)

    return weight(width, hidden), weight(width, hidden), weight(hidden, width)


def _rounds(
    ffns: dict[int, tuple[Tensor, ...]], act_TD: Tensor, rounds: int, order: random.Random
) -> dict[int, list[float]]:
    """Return seconds of every round of every width; one round before them warms up."""
    timed: dict[int, list[float]] = {width: [] for width in ffns}
    # A decode step is so short that one alone would measure the clock.
    repeats = 1 if act_TD.shape[0] > 64 else 5
    for number in range(rounds + 1):
        for width in order.sample(list(ffns), len(ffns)):
            gate_FD, up_FD, down_DF = ffns[width]
            _wait(act_TD)
            start = time.perf_counter()
            for _ in range(repeats):
                act_TF = silu(linear(act_TD, gate_FD)) * linear(act_TD, up_FD)
                linear(act_TF, down_DF)
            _wait(act_TD)
            if number:
                timed[width].append((time.perf_counter() - start) / repeats)
    return timed


def _wait(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


if __name__ == "__main__":
    main()
