"""`cfsp prune`: a model and a text in, a smaller checkpoint out."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments, recover
from cfsp.cli import goal as goals
from cfsp.cli.output import human_bytes, human_count, print_json, print_passes, print_table
from cfsp.cli.plan import print_plan
from cfsp.errors import UsageError
from cfsp.processes import process_count

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Statistics
    from cfsp.planning.allocation import Budget
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.recovery.recover_report import RecoverReport
    from cfsp.recovery.settings import Training
    from cfsp.result.prune_report import PruneReport
    from cfsp.settings import PruneSettings


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
    arguments.add_budget(parser)
    goals.add_goals(parser, has_text=True)
    arguments.add_calibration_text(parser)
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="with --restore none or bias: shift width between blocks while that brings the "
        "predictions nearer to the dense model's; a round costs about one forward pass over a few "
        "windows for every block, with the whole model in memory (default: 0)",
    )
    group.add_argument(
        "--restore",
        default="ridge",
        choices=arguments.RESTORE_METHODS,
        help="repair the down projections by least squares (ridge, default); then again "
        "on the pruned model's own hidden states, towards the dense model's (sequential); then "
        "train a few blocks at a time towards these (local); or add the mean of what was removed "
        "as a bias of the down projections (bias); or nothing (none)",
    )
    group.add_argument(
        "--local-steps",
        type=int,
        metavar="N",
        help="of --restore local, for each group of blocks (default: 100)",
    )
    group.add_argument(
        "--local-blocks",
        type=int,
        metavar="N",
        help="of --restore local, how many consecutive blocks train together, twice as many at the "
        "model's end; more need more memory (default: 3)",
    )
    group.add_argument(
        "--local-text",
        type=float,
        metavar="F",
        help="of --restore local, the part of the text itself in the loss of the last blocks, from "
        "0 to 1; the rest is the divergence from the dense model (default: 0.5)",
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
    group.add_argument(
        "--recover",
        type=float,
        metavar="MINUTES",
        help="then train for so long on the same texts with LoRA by importance; the pruned model "
        "stays in OUT-pruned (`cfsp recover` has all options)",
    )
    group.add_argument("--eval-windows", type=int, default=12, metavar="N", help="(default: 12)")
    arguments.add_compute(parser)
    arguments.add_memory_budget(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def check_together(args: argparse.Namespace) -> None:
    """Check what can be told from the arguments alone.

    Raises:
        UsageError: some exclude each other, or one needs another.
    """
    if process_count() > 1:
        raise UsageError(
            "prune runs in one process; under torchrun run `cfsp calibrate MODEL --out FILE`, "
            "then here `cfsp prune MODEL --statistics FILE` without torchrun"
        )
    if args.plan and args.statistics:
        raise UsageError("--plan and --statistics exclude each other: a plan is made already")
    if args.plan and (found := goals.given(args)):
        raise UsageError(f"--plan and {found[0]} exclude each other: a plan has its sparsity")
    if not args.plan:
        goals.check_goal(args)
    if args.max_loss_increase is not None and args.statistics and not args.held_out:
        raise UsageError(
            "--max-loss-increase with --statistics needs a --held-out text: which windows were "
            "calibrated on before is not known"
        )
    if args.plan and args.search:
        raise UsageError("--plan and --search exclude each other: a plan has its widths")
    if args.dry_run and args.recover is not None:
        raise UsageError("--dry-run and --recover exclude each other: nothing is written to train")


def run(args: argparse.Namespace) -> None:
    """Prune."""
    check_together(args)

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.checkpoint.output import check_output_is_free
    from cfsp.pipeline import prune_checkpoint
    from cfsp.planning.allocation import Budget
    from cfsp.planning.plan_file import PruningPlan

    budget = Budget(0.0) if args.plan else arguments.budget(args)
    goal = goals.goal(args)
    plan = PruningPlan.load(args.plan) if args.plan else None
    statistics = Statistics.load(args.statistics) if args.statistics else None
    source = open_checkpoint(args.model, args.revision)
    settings = _settings(args, budget, plan, statistics)
    pruned, training = args.out, None
    if args.recover is not None:
        training = _training(args)
        check_output_is_free(args.out)
        pruned = args.out.with_name(f"{args.out.name}-pruned")
    report = prune_checkpoint(
        source,
        pruned,
        settings,
        goal=goal,
        statistics=statistics,
        plan=plan,
        evaluation=arguments.evaluation_text(args.eval, args.eval_windows, args.seqlen),
        dry_run=args.dry_run,
        command=arguments.typed_command(),
    )
    recovery = _recover(args, pruned, settings, training) if training is not None else None
    if args.json:
        print_json(report.to_json() | ({"recovery": vars(recovery)} if recovery else {}))
        return
    goals.print_goal(report.goal)
    if args.dry_run:
        print_plan(report.plan)
        print()
    print_report(report)
    if recovery is not None:
        print()
        recover.print_report(recovery)


def _settings(
    args: argparse.Namespace,
    budget: Budget,
    plan: PruningPlan | None,
    statistics: Statistics | None,
) -> PruneSettings:
    """Return how to prune; the text is left out where none is needed."""
    from cfsp.repair.local_training import LocalTraining
    from cfsp.settings import FITTED, CalibrationText, PruneSettings

    needs_means = args.restore == "bias" and not args.dry_run
    passes_text = args.restore in FITTED and not args.dry_run
    needs_text = (
        passes_text or args.search > 0 or (statistics is None and (plan is None or needs_means))
    )
    local = {
        "steps": args.local_steps,
        "blocks": args.local_blocks,
        "text": args.local_text,
    }
    given = {name: value for name, value in local.items() if value is not None}
    if given and args.restore != "local":
        raise UsageError(f"--local-{next(iter(given))} belongs to --restore local")
    return PruneSettings(
        budget=budget,
        criterion=arguments.criterion(args),
        text=arguments.calibration_text(args)
        if needs_text
        else CalibrationText(seqlen=args.seqlen),
        compute=arguments.compute(args),
        restore=args.restore,
        search_rounds=args.search,
        local=LocalTraining(**given),
    )


def _training(args: argparse.Namespace) -> Training:
    from cfsp.recovery.settings import Limit, Training

    limit = Limit(minutes=args.recover)
    return Training(limit, seqlen=min(args.seqlen, Training.seqlen), seed=args.seed)


def _recover(
    args: argparse.Namespace, pruned: Path, settings: PruneSettings, training: Training
) -> RecoverReport:
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.recovery.recover import recover_checkpoint
    from cfsp.settings import Compute

    return recover_checkpoint(
        open_checkpoint(pruned),
        args.out,
        data=settings.text.names,
        training=training,
        evaluation=arguments.evaluation_text(args.eval, args.eval_windows, args.seqlen),
        compute=Compute(args.device, args.dtype if args.dtype != "float16" else "auto"),
        command=arguments.typed_command(),
    )


def _describe_restoration(restoration: dict[str, Any]) -> str:
    if restoration["method"] == "bias":
        return "restored: the down projections have a bias, the mean of what was removed"
    blocks = restoration["blocks"]
    before = fmean(block["error_before"] for block in blocks)
    after = fmean(block["error_after"] for block in blocks)
    text = f"restored: FFN output error on held-out windows {before:.3f} -> {after:.3f}"
    if alone := restoration["left_alone"]:
        text += f"; blocks better left alone: {', '.join(map(str, alone))}"
    for key, what in (("sequential", "fitted again"), ("local", "reconstructed")):
        # Blocks that train together share one error, so not every block has its own.
        if entries := [entry for block in blocks if (entry := block.get(key)) is not None]:
            before = fmean(entry["error_before"] for entry in entries)
            after = fmean(
                entry["error_after"] if entry["is_better"] else entry["error_before"]
                for entry in entries
            )
            text += (
                f"\n{what}: hidden states' error on held-out windows {before:.3f} -> {after:.3f}"
            )
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
    print()
    print_passes(report.passes)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    print(f"{stages}; peak memory {human_bytes(report.peak_rss_bytes)}")
    if report.out:
        print(f"written to {report.out}")
