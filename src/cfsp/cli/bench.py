"""Time models against each other, beside the ratio that their sizes promise.

cfsp bench MODEL smaller --prompt 512 --new-tokens 32
"""

from __future__ import annotations

import argparse
import math
from statistics import median
from typing import TYPE_CHECKING

from cfsp.architecture.block_names import counted
from cfsp.cli.options import Parser
from cfsp.cli.output import Told, human_bytes, human_count, print_table
from cfsp.settings import DTYPES

if TYPE_CHECKING:
    from cfsp.speed.bench import Comparison, Speed
    from cfsp.speed.subjects import Workload


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="as for prune; ratios are to the first",
    )
    work = parser.add_argument_group("what to time; several are timed one after the other")
    for name, default, what in (
        ("batch", 1, "sequences at once"),
        ("prompt", 512, "prompt tokens of each"),
        ("new-tokens", 32, "tokens generated for each"),
    ):
        work.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            default=[default],
            metavar="N",
            help=f"{what} (default: {default})",
        )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--rounds", type=int, metavar="N", default=7, help="timed runs of each model (default: 7)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps, auto (default: cpu)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        metavar="NAME",
        help="auto (the model's own), float32, bfloat16, float16",
    )


def run(args: argparse.Namespace) -> Told:
    from cfsp.speed.bench import bench

    names = ("batch", "prompt", "new_tokens", "rounds", "device", "dtype")
    comparison = bench(args.models, **{name: getattr(args, name) for name in names})
    return comparison.to_json(), lambda: print_comparison(comparison)


def print_comparison(comparison: Comparison) -> None:
    """Print one table of sizes and one for each workload."""
    print_table(
        ("model", "parameters", "on disk", "peak memory", "load"),
        [
            (
                model.label,
                human_count(model.footprint.parameters),
                human_bytes(model.footprint.disk_bytes),
                human_bytes(model.peak_device_bytes or model.peak_rss_bytes),
                f"{model.load_seconds:.1f} s",
            )
            for model in comparison.models
        ],
    )
    for workload, share in comparison.disturbance.items():
        rounds = len(comparison.models[0].speeds[workload]["prefill"].ratios)
        print(
            f"\n{workload.describe()}, {counted(rounds, 'rounds')}; other programs took "
            f"{share:.0%} of the processors"
        )
        _print_workload(comparison, workload)
        if comparison.models[0].speeds[workload]["decode"].too_busy:
            print("the machine is too busy for a verdict: repeat it when nothing else runs")
    facts = ", ".join(f"{key} {value}" for key, value in comparison.models[0].facts.items())
    print(
        f"\n{facts}; medians of rounds in turns after "
        f"{counted(comparison.conditions.warmups, 'warm-ups')}, with the lowest and highest; "
        "ratio: median of the ratios within a round; ideal: by matrices (prefill) and by bytes "
        "read (decode)"
    )


def _print_workload(comparison: Comparison, workload: Workload) -> None:
    rows = []
    for phase in ("prefill", "decode"):
        for model in comparison.models:
            speed = model.speeds[workload][phase]
            rates, first_token = speed.tokens_per_second, 1000 * median(speed.seconds)
            rows.append(
                (
                    f"{phase}  {model.label}",
                    f"{median(rates):,.1f}",
                    f"{min(rates):,.1f} - {max(rates):,.1f}",
                    f"{first_token:,.0f} ms" if phase == "prefill" else "",
                    *_ratios(speed),
                )
            )
    head = ("phase, model", "tokens/s", "range", "first token", "ratio", "range", "ideal", "of it")
    print_table(head, rows)


def _ratios(speed: Speed) -> tuple[str, str, str, str]:
    ideal = "unknown" if math.isnan(speed.ideal_ratio) else f"{speed.ideal_ratio:.3f}x"
    if speed.too_busy:
        return "too busy", "", ideal, ""
    share = "" if math.isnan(speed.ideal_ratio) else f"{speed.median_ratio / speed.ideal_ratio:.0%}"
    spread = f"{min(speed.ratios):.3f} - {max(speed.ratios):.3f}"
    return f"{speed.median_ratio:.3f}x", spread, ideal, share
