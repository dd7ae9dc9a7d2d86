"""Time models against each other, beside the ratio that their sizes promise.

cfsp bench MODEL smaller --prompt 512 --new-tokens 32
"""

from __future__ import annotations

import argparse
import math
from statistics import median
from typing import TYPE_CHECKING

from cfsp.architecture.block_names import counted
from cfsp.cli.options import Parser, add_options, typed
from cfsp.cli.output import Told, human_bytes, human_count, print_table
from cfsp.processes import check_is_alone
from cfsp.settings import TimingConditions, Workload, options_of

if TYPE_CHECKING:
    from cfsp.speed.bench import Comparison, Speed


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="as for prune; ratios are to the first"
    )
    work = parser.add_argument_group("what to time; several are timed one after the other")
    add_options(parser, work, Workload, nargs="+")
    add_options(parser, parser.add_argument_group("how"), TimingConditions)


def run(args: argparse.Namespace) -> Told:
    check_is_alone("cfsp bench")
    from cfsp.speed.bench import bench

    known = (*options_of(Workload), *options_of(TimingConditions))
    given = {name: value for name, value in typed(args).items() if name in known}
    comparison = bench(args.models, **given)
    return comparison.to_json(), lambda: print_comparison(comparison)


def print_comparison(comparison: Comparison) -> None:
    """Print one table of sizes and one for each workload."""
    print_table(
        ("model", "parameters", "on disk", "peak memory", "load"),
        [
            (
                model.label,
                human_count(model.footprint.parameters),
                human_bytes(model.footprint.weight_bytes),
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
    head = "phase, model", "tokens/s", "range", "first token", "ratio", "range", "ideal", "of ideal"
    print_table(head, rows)


def _ratios(speed: Speed) -> tuple[str, str, str, str]:
    ideal = "unknown" if math.isnan(speed.ideal_ratio) else f"{speed.ideal_ratio:.3f}x"
    if speed.too_busy:
        return "too busy", "", ideal, ""
    share = "" if math.isnan(speed.ideal_ratio) else f"{speed.median_ratio / speed.ideal_ratio:.0%}"
    spread = f"{min(speed.ratios):.3f} - {max(speed.ratios):.3f}"
    return f"{speed.median_ratio:.3f}x", spread, ideal, share
