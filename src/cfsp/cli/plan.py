"""Decide from saved statistics which channels stay.

cfsp plan MODEL --statistics stats.safetensors --sparsity 0.5 --out plan.json
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments
from cfsp.cli.options import Parser, typed
from cfsp.cli.output import Told, print_table
from cfsp.settings import DEFAULT_PARTS, multiple_in_words, prune_settings

if TYPE_CHECKING:
    from cfsp.planning.plan_file import PruningPlan


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    arguments.add_model(parser)
    parser.add_argument(
        "--statistics", required=True, type=Path, metavar="FILE", help="from cfsp calibrate"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the plan, JSON")
    arguments.add_budget(parser, has_text=False)
    arguments.add_compute(parser)


def run(args: argparse.Namespace) -> Told:
    """Make and write a plan."""
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.checkpoint.output import check_file_is_free, check_is_outside
    from cfsp.pipeline import plan_from
    from cfsp.result.manifest import removed_facts

    check_file_is_free(args.out)
    settings = prune_settings({"parts": DEFAULT_PARTS} | typed(args))
    source = open_checkpoint(args.model, parts=settings.budget.parts)
    check_is_outside(args.out, source.directory)
    plan, resolution = plan_from(source, Statistics.load(args.statistics), settings)
    plan.save(args.out)
    told = {
        "out": str(args.out),
        **removed_facts(plan),
        "ffn_sparsity": round(plan.ffn_sparsity, 6),
        "intermediate_sizes": plan.widths_of("ffn")[1],
        **({} if plan.kept_experts is None else {"kept_experts": plan.kept_experts}),
        **({} if plan.has_ffns_only else {"kv_groups": plan.widths_of("kv")[1]}),
        "experts_with_few_tokens": plan.experts_with_few_tokens,
        "goal": resolution,
    }

    def say() -> None:
        print_goal(resolution)
        print_plan(plan)
        print(f"\nwritten to {args.out}; prune by it with:")
        print(shlex.join(["cfsp", "prune", args.model, "--plan", str(args.out), "--out", "OUT"]))

    return told, say


def print_plan(plan: PruningPlan) -> None:
    """Print importance and width of every unit."""
    from cfsp.result.facts import unit_rows

    bars = [
        (f"{unit.kept_share:.0%}", f"{'#' * round(20 * unit.kept_share):<20}")
        for unit in plan.units
    ]
    rows = [(*row, *bar) for row, bar in zip(unit_rows(plan.units), bars, strict=True)]
    print_table(("block", "distance", "importance", "channels", "kept", "", ""), rows)
    what = "channels" if plan.counts_channels else "parameters"
    groups = "" if plan.has_ffns_only else f" and {plan.kv_sparsity:.1%} of the KV groups"
    if plan.kept_experts is not None:
        print(f"\n{plan.experts_in_words}", end="")
    if plan.has_gaps:
        print(f"\n{plan.removed_in_words}: removed", end="")
    print(f"\n{plan.ffn_sparsity:.1%} of the FFN {what}{groups} go")
    multiple = plan.criterion.get("multiple")
    if multiple and any(unit.kept_width < unit.width for unit in plan.kept_units):
        print(multiple_in_words(multiple))


def print_goal(resolution: dict[str, Any]) -> None:
    """Print what was tried for a goal, as its JSON has it; nothing if nothing was."""
    from cfsp.planning.candidate import Candidate
    from cfsp.result.facts import goal_in_words, goal_table

    if (tried := goal_table(resolution)) is not None:
        chosen = Candidate.from_json(resolution["chosen"]).in_words
        print(f"{tried.to_text()}\n\n{goal_in_words(resolution)}: {chosen} go\n")
