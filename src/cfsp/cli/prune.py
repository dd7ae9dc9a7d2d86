"""`cfsp prune`: a model and a text in, a smaller checkpoint out."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json, print_table
from cfsp.cli.plan import print_plan
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.pipeline import PruneReport


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "prune",
        "remove the weakest FFN channels and write a smaller checkpoint",
        "cfsp prune meta-llama/Llama-3.2-1B --sparsity 0.2 --data wikitext2 --data c4 --out small",
    )
    arguments.add_model(parser)
    parser.add_argument("--out", required=True, type=Path, help="new directory")
    arguments.add_budget(parser, required=False)
    arguments.add_calibration_text(parser)
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--restore",
        default="ridge",
        choices=arguments.RESTORE_METHODS,
        help="repair the down projections by least squares (ridge, default), or not",
    )
    group.add_argument("--plan", type=Path, metavar="FILE", help="obey this plan")
    group.add_argument(
        "--statistics", type=Path, metavar="FILE", help="plan from these, without a forward pass"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan and write only it into --out"
    )
    group.add_argument(
        "--eval",
        action="append",
        metavar="TEXT",
        help="measure perplexity on this text, before and after",
    )
    group.add_argument("--eval-windows", type=int, default=12, metavar="N", help="(default: 12)")
    arguments.add_compute(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prune."""
    if args.plan and args.statistics:
        raise UsageError("--plan and --statistics exclude each other: a plan is made already")
    if args.plan and args.sparsity is not None:
        raise UsageError("--plan and --sparsity exclude each other: a plan has its sparsity")

    from cfsp.allocation import Budget
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.pipeline import prune_checkpoint
    from cfsp.pruning_plan import PruningPlan
    from cfsp.settings import CalibrationText, PruneSettings

    budget = Budget(0.0) if args.plan else arguments.budget(args)
    plan = PruningPlan.load(args.plan) if args.plan else None
    statistics = Statistics.load(args.statistics) if args.statistics else None
    source = open_checkpoint(args.model, args.revision)
    restores = args.restore != "none" and not args.dry_run
    needs_text = restores or (plan is None and statistics is None)
    settings = PruneSettings(
        budget=budget,
        criterion=arguments.criterion(args),
        text=arguments.calibration_text(args) if needs_text else CalibrationText(),
        compute=arguments.compute(args),
        restore=args.restore,
    )
    report = prune_checkpoint(
        source,
        args.out,
        settings,
        statistics=statistics,
        plan=plan,
        evaluation=arguments.evaluation_text(args.eval, args.eval_windows, args.seqlen),
        dry_run=args.dry_run,
        command=arguments.typed_command(),
    )
    if args.json:
        print_json(report.to_json())
        return
    if args.dry_run:
        print_plan(report.plan)
        print()
    print_report(report)


def _describe_restoration(restoration: dict[str, Any]) -> str:
    blocks = restoration["blocks"]
    before = fmean(block["error_before"] for block in blocks)
    after = fmean(block["error_after"] for block in blocks)
    text = f"restored: FFN output error on held-out windows {before:.3f} -> {after:.3f}"
    if alone := restoration["left_alone"]:
        text += f"; blocks better left alone: {', '.join(map(str, alone))}"
    return text


def print_report(report: PruneReport) -> None:
    """Print what pruning gained and lost."""
    before, after = report.parameters_before, report.parameters_after
    channels_before = sum(block.width for block in report.plan.blocks)
    channels_after = sum(report.intermediate_sizes)
    rows = [
        ("parameters", human_count(before), human_count(after), f"{after / before - 1:+.1%}"),
        (
            "FFN channels",
            f"{channels_before:,}",
            f"{channels_after:,}",
            f"{channels_after / channels_before - 1:+.1%}",
        ),
    ]
    for text, value in report.perplexity.items():
        change = f"{value['after'] / value['before'] - 1:+.1%}"
        rows.append(
            (f"perplexity, {text}", f"{value['before']:.2f}", f"{value['after']:.2f}", change)
        )
    print_table(("", "before", "after", "change"), rows)
    if report.restoration:
        print(f"\n{_describe_restoration(report.restoration)}")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    print(f"\n{stages}; peak memory {human_bytes(report.peak_rss_bytes)}")
    if report.out:
        print(f"written to {report.out}")
