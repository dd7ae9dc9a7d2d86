"""Remove the weakest FFN channels, or other parts, and write a smaller checkpoint.

cfsp prune meta-llama/Llama-3.2-1B --sparsity 0.2 --data wikitext2 --data c4 --out small
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.cli import recover
from cfsp.cli.options import Parser, add_advanced, add_model, add_options, typed, typed_command
from cfsp.cli.output import Told, human_bytes, human_count, print_facts, print_goal, print_plan
from cfsp.errors import UsageError
from cfsp.processes import check_is_alone, joined, take_own_accelerator
from cfsp.settings import (
    BEST_EFFORT,
    COUNTED,
    DEFAULT_PARTS,
    EFFORTS,
    GOALS,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    EvaluationText,
    PruneSettings,
    asked,
    given_of,
    prune_settings,
)
from cfsp.text.sources import check_texts

if TYPE_CHECKING:
    from cfsp.pruning_cost import PruningCost
    from cfsp.result.prune_report import PruneReport


def add_options_to(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and write only it into --out"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="say what memory, disk and time it takes, how small the model becomes, and stop",
    )
    add_options(parser, parser, CalibrationText)
    add_options(parser, parser, EvaluationText, fields=("names", "windows"))
    parser.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        metavar="LEVEL",
        help="fast: no repair; standard (default): least squares; best: training, too, which "
        "takes several times as long",
    )
    add_options(parser, parser, PruneSettings)
    add_options(parser, parser, Compute)
    add_advanced(
        parser,
        "--statistics",
        type=Path,
        metavar="FILE",
        help="plan from these (cfsp calibrate made them), without a forward pass",
    )
    removed = parser.add_argument_group("what to remove (one of these, of what --parts names)")
    for settings in (Budget, *GOALS, Criterion):
        add_options(parser, removed, settings)
    removed.add_argument("--plan", type=Path, metavar="FILE", help="what this plan says")


def _settings(args: argparse.Namespace) -> PruneSettings:
    """Return all that a pruning is asked for; a plan has its own budget."""
    given, plan = typed(args), args.plan is not None
    how_much, is_bound = asked(given), args.max_loss_increase is not None
    if args.out is None and not args.estimate:
        raise UsageError("expected --out, the directory to write into, found none")
    for flag, asks in {"--estimate": args.estimate, "--max-loss-increase": is_bound}.items():
        if asks:
            check_is_alone(flag, "leave it out, or prune without torchrun")
    if args.dry_run and args.eval:
        raise UsageError(
            "--dry-run and --eval exclude each other: only a plan is written, of which nothing can "
            "be measured"
        )
    if plan and args.statistics:
        raise UsageError("--plan and --statistics exclude each other: a plan is made already")
    chosen = [flag for of in (*GOALS, Budget, Criterion) for flag in given_of(of, given).values()]
    if plan and chosen:
        raise UsageError(f"--plan and {chosen[0]} exclude each other: a plan is made already")
    if is_bound and args.statistics:
        raise UsageError(
            "--max-loss-increase and --statistics exclude each other: which windows were "
            "calibrated on before is not known, and it measures on others"
        )
    settings = prune_settings(given | ({"sparsity": 0.0, "parts": DEFAULT_PARTS} if plan else {}))
    if args.estimate:
        unknown = {
            "--dry-run": args.dry_run,
            "--eval": args.eval,
            "--effort best": args.effort == BEST_EFFORT,
            f"--repair {settings.repair}": settings.repair not in ("none", "ridge"),
            **{f"--parts {part}": part in settings.budget.parts for part in COUNTED},
            "--plan": plan,
            "--statistics": args.statistics,
            **dict.fromkeys(how_much[:1] if settings.goal else (), True),
        }
        for option in [option for option, is_given in unknown.items() if is_given]:
            raise UsageError(f"--estimate does not know what {option} takes; leave one of them out")
    return settings


def run(args: argparse.Namespace) -> Told:
    settings = _settings(args)
    check_texts(args.data, args.eval)

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.loading import compute_device
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.decide import Known
    from cfsp.pipeline import check_beforehand, prune_checkpoint
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.prune_and_recover import prune_and_recover
    from cfsp.pruning_cost import doubts, pruning_cost, say_doubts

    plan = PruningPlan.load(args.plan) if args.plan else None
    statistics = Statistics.load(args.statistics) if args.statistics else None
    take_own_accelerator(settings.compute.device)
    parts = plan.parts if plan else settings.budget.parts
    source = open_checkpoint(args.model, parts=parts)
    if args.estimate:
        check_beforehand(source, args.out, settings)
        cost = pruning_cost(source, args.out or Path(), settings)
        say_doubts(doubts(source, settings))
        return vars(cost), lambda: _print_estimate(cost)
    recovery = None
    with joined(compute_device(settings.compute.device)) as team:
        also: dict[str, Any] = {
            "known": Known(statistics, plan),
            "command": typed_command(args),
            "team": team,
        }
        if args.effort == BEST_EFFORT and not args.dry_run:
            report, recovery = prune_and_recover(source, args.out, settings, **also)
        else:
            report = prune_checkpoint(source, args.out, settings, dry_run=args.dry_run, **also)
    if not team.is_first:
        return None

    def say() -> None:
        print_goal(report.goal)
        if args.dry_run:
            print_plan(report.plan)
            print()
        print_report(report)
        if args.dry_run:
            print(f"plan written to {args.out / PLAN_FILE}")
        if recovery is not None:
            print()
            recover.print_report(recovery)

    told = report.to_json()
    if recovery is not None:
        told |= {"out": recovery.out, "recovery": vars(recovery)}
    return told, say


def _print_estimate(cost: PruningCost) -> None:
    for name, needed, available in (
        ("memory", cost.memory_bytes, cost.memory_available),
        ("disk", cost.disk_bytes, cost.disk_available),
    ):
        short = "" if needed <= available else ": NOT ENOUGH"
        print(f"{name} {human_bytes(needed)} of {human_bytes(available)} available{short}")
    before, after = cost.parameters_before, cost.parameters_after
    print(
        f"parameters {human_count(before)} -> about {human_count(after)} "
        f"({after / before - 1:+.1%}), {human_bytes(cost.weight_bytes_after)} of weights"
    )
    if cost.flop is not None and cost.seconds is not None:
        print(
            f"time {cost.seconds / 60:,.0f} minutes and more: {cost.flop / 1e12:,.1f} TFLOP of "
            "matrix products, at the speed of this machine now"
        )


def print_report(report: PruneReport) -> None:
    from cfsp.result.facts import perplexity_facts, size_facts, what_went
    from cfsp.result.making import seconds_in_words, steps_in_words

    told = report.to_json()
    print_facts([*size_facts(told), *perplexity_facts(told)])
    if is_whole := report.parameters_after == report.parameters_before:
        why = "as it was asked for"
        # Of a goal it is what was chosen; to keep 1 of what there is asks for nothing.
        if report.plan.criterion["sparsity"] or report.goal.get("asked", 1) != 1:
            why = "the least that can go is more than what was asked for"
            criterion = report.plan.criterion
            if criterion["of"] == "ffn" and (multiple := criterion["multiple"]) > 1:
                why += f", in multiples of {multiple}; give a smaller --multiple"
        print(f"nothing was removed: {why}")
    else:
        print(f"without {what_went(told, by_channels=report.plan.counts_channels)}")
    if report.experts:
        print(report.plan.experts_in_words)
    if report.dequantised:
        print(
            f"dequantised from {report.dequantised['from']} to {report.dequantised['to']}: larger "
            "per weight than the original until it is quantised again"
        )
    # Where nothing went there was nothing to repair.
    if (steps := report.repair["steps"]) and not is_whole:
        print(f"repaired by {steps_in_words(steps)}")
    # A plan that was made already takes no time.
    took = f"{seconds_in_words(report.seconds)}; " if report.seconds else ""
    print(f"{took}peak memory {human_bytes(report.peak_rss_bytes)}")
    if report.out:
        print(f"written to {report.out}")
