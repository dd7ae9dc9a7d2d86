"""`cfsp plan`: from statistics to a plan, without a forward pass."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments
from cfsp.cli.options import typed
from cfsp.cli.output import human_count, print_json, print_table
from cfsp.errors import OutputError
from cfsp.settings import DEFAULT_PARTS, multiple_in_words, prune_settings

if TYPE_CHECKING:
    from cfsp.planning.plan_file import PruningPlan


_NOUNS = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "plan",
        "decide from saved statistics which channels stay",
        "cfsp plan MODEL --statistics stats.safetensors --sparsity 0.5 --out plan.json",
    )
    arguments.add_model(parser)
    parser.add_argument(
        "--statistics", required=True, type=Path, metavar="FILE", help="from cfsp calibrate"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the plan, JSON")
    arguments.add_budget(parser, has_text=False)
    arguments.add_compute(parser)


def run(args: argparse.Namespace) -> None:
    """Make and write a plan."""
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.checkpoint.output import check_is_outside
    from cfsp.pipeline import plan_from
    from cfsp.result.manifest import removed_facts

    if args.out.exists():
        raise OutputError(f"{args.out} exists already; choose another file")
    settings = prune_settings({"parts": DEFAULT_PARTS} | typed(args))
    source = open_checkpoint(args.model, parts=settings.budget.parts)
    check_is_outside(args.out, source.directory)
    plan, resolution = plan_from(source, Statistics.load(args.statistics), settings)
    plan.save(args.out)
    if args.json:
        print_json(
            {
                "out": str(args.out),
                **removed_facts(plan),
                "ffn_sparsity": round(plan.ffn_sparsity, 6),
                "intermediate_sizes": plan.widths_of("ffn")[1],
                **({} if plan.kept_experts is None else {"kept_experts": plan.kept_experts}),
                **({} if plan.has_ffns_only else {"kv_groups": plan.widths_of("kv")[1]}),
                "experts_with_few_tokens": plan.experts_with_few_tokens,
                "goal": resolution,
            }
        )
        return
    print_goal(resolution)
    print_plan(plan)
    print(f"\nwritten to {args.out}; prune by it with:")
    print(shlex.join(["cfsp", "prune", args.model, "--plan", str(args.out), "--out", "OUT"]))


def print_plan(plan: PruningPlan) -> None:
    """Print importance and width of every unit."""
    rows = [
        (
            unit.name,
            f"{unit.distance:.4f}",
            f"{unit.importance:.3f}",
            str(unit.width),
            unit.kept_in_words,
            f"{unit.kept_share:.0%}",
            "#" * round(20 * unit.kept_share),
        )
        for unit in plan.units
    ]
    head = ("block", "distance", "importance", "channels", "kept", "", "")
    print_table(head, [(*row[:-1], row[-1].ljust(20)) for row in rows])
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
    if not resolution.get("tried"):
        return

    from cfsp.planning.candidate import Candidate

    noun = _NOUNS[resolution["goal"]]
    rows = [
        (
            f"{entry['sparsity']:.1%}",
            human_count(entry["parameters"]),
            f"{entry['value']:.3f}",
            "yes" if entry["fits"] else "no",
        )
        for entry in sorted(resolution["tried"], key=lambda entry: entry["sparsity"])
    ]
    print_table(("sparsity", "parameters", noun, "fits"), rows)
    chosen = Candidate.from_json(resolution["chosen"]).in_words
    print(f"\n{_in_words(resolution)}: {chosen} go\n")


def _in_words(resolution: dict[str, Any]) -> str:
    asked, conditions = resolution["asked"], resolution["conditions"]
    if resolution["goal"] == "target_speedup":
        return f"at least {asked:g} times faster in {conditions['phase']}"
    text = f"at most {asked:g} nats per token over {conditions['dense_loss']:.3f}, before repair"
    if "result" in resolution:
        text += f" (the result: {resolution['result']:+.3f})"
    return text
