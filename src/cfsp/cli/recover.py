"""`cfsp recover`: train a pruned checkpoint, most where the coarse importance is high."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json, print_table
from cfsp.processes import is_first_process, leave_processes

if TYPE_CHECKING:
    from cfsp.recovery.recover_report import RecoverReport
    from cfsp.recovery.settings import Training
    from cfsp.recovery.teacher import TeacherChoice

# Spelled out here, because their home imports torch; a test compares.
METHODS = ("lora", "dora", "full")
TARGETS = ("mlp", "attention", "all")
RANK_ALLOCATIONS = ("importance", "uniform", "inverse", "error")


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "recover",
        "train a pruned checkpoint to win back quality and write it in the same layout",
        "cfsp recover smaller --data wikitext2 --data c4 --max-minutes 30 --out recovered",
    )
    arguments.add_model(parser)
    parser.add_argument("--out", required=True, type=Path, help="new directory")
    add_what(parser)
    add_length(parser)
    add_how(parser)
    add_teacher(parser)
    group = parser.add_argument_group("stages")
    group.add_argument(
        "--resume", action="store_true", help="continue after a kill, with the same arguments"
    )
    group.add_argument(
        "--keep-adapter", action="store_true", help="also write the PEFT adapter, into OUT/adapter"
    )
    group.add_argument(
        "--eval",
        action="append",
        metavar="TEXT",
        help="measure perplexity on this text, before and after",
    )
    group.add_argument("--eval-windows", type=int, default=12, metavar="N", help="(default: 12)")
    group.add_argument("--device", default="auto", help="(default: an accelerator if any)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the arithmetic (default: the model's own; float32 where bfloat16 is not native)",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def add_what(parser: argparse.ArgumentParser) -> None:
    """Add what is trained."""
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--method",
        default="lora",
        choices=METHODS,
        help="low-rank adapters (default), the same with lengths, or the projections themselves",
    )
    group.add_argument(
        "--targets", default="all", choices=TARGETS, help="projections to train (default: all)"
    )
    group.add_argument(
        "--rank", type=float, default=8, metavar="R", help="mean over blocks (default: 8)"
    )
    group.add_argument(
        "--rank-allocation",
        default="importance",
        choices=RANK_ALLOCATIONS,
        help="ranks follow the blocks' importance (default), are equal, follow its inverse, or the "
        "error that restoration left",
    )


def add_length(parser: argparse.ArgumentParser) -> None:
    """Add how long training lasts."""
    group = parser.add_argument_group("how long (one of these)")
    only = group.add_mutually_exclusive_group(required=True)
    only.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    only.add_argument("--epochs", type=float, metavar="N", help="passes over the text")
    only.add_argument("--max-minutes", type=float, metavar="M", help="minutes, all included")


def add_how(parser: argparse.ArgumentParser) -> None:
    """Add text and training arguments."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--data",
        action="append",
        metavar="TEXT",
        help="text as for prune, or conversations (column `messages`, trained on answers only); "
        "repeatable",
    )
    group.add_argument("--learning-rate", type=float, metavar="LR", help="at its peak")
    group.add_argument(
        "--batch-windows", type=int, default=4, metavar="N", help="on each process (default: 4)"
    )
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches in a step (default: 1)"
    )
    group.add_argument(
        "--seqlen", type=int, default=512, metavar="T", help="tokens in a window (default: 512)"
    )
    group.add_argument(
        "--evaluations", type=int, default=10, metavar="N", help="in the run (default: 10)"
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    group.add_argument("--seed", type=int, default=0, help="(default: 0)")
    arguments.add_bos(group)


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """Add distillation."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher",
        metavar="MODEL",
        help="the dense model that was pruned (default: none; in the same time, text alone wins)",
    )
    group.add_argument(
        "--teacher-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="of the teacher against the text, in [0, 1] (default: 1)",
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: 1)")
    group.add_argument(
        "--teacher-top-k",
        type=int,
        metavar="K",
        help="store the teacher's K likeliest tokens on disk once, instead of keeping it in memory",
    )


def run(args: argparse.Namespace) -> None:
    """Recover."""
    arguments.check_texts(args.data, args.eval)

    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.recovery.adaptation import Adaptation
    from cfsp.recovery.recover import recover_checkpoint
    from cfsp.settings import Compute

    training = _training(args)
    report = recover_checkpoint(
        open_checkpoint(args.model, args.revision),
        args.out,
        data=args.data or (),
        training=training,
        adaptation=Adaptation(
            args.method, args.targets, args.rank, allocation=args.rank_allocation
        ),
        teacher=_teacher(args),
        evaluation=arguments.evaluation_text(args.eval, args.eval_windows, bos=args.bos),
        compute=Compute(args.device, args.dtype),
        resume=args.resume,
        keep_adapter=args.keep_adapter,
        command=arguments.typed_command(),
    )
    leave_processes()
    if not is_first_process():
        return
    if args.json:
        print_json(vars(report))
        return
    print_report(report)


def print_report(report: RecoverReport) -> None:
    """Print what recovery gained."""
    rows = [
        (
            f"perplexity, {text}",
            f"{value['before']:.2f}",
            f"{value['after']:.2f}",
            f"{value['after'] / value['before'] - 1:+.1%}",
        )
        for text, value in report.perplexity.items()
    ]
    if rows:
        print_table(("", "before", "after", "change"), rows)
        print()
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    print(
        f"{report.steps} steps of {report.tokens_in_step:,} tokens, "
        f"{report.tokens_per_second:,.0f} tokens/s; "
        f"{human_count(report.trainable_parameters)} parameters trained; "
        f"kept the weights of step {report.best_step}\n"
        f"{stages}; peak memory {human_bytes(report.peak_rss_bytes)}\nwritten to {report.out}"
    )


def _training(args: argparse.Namespace) -> Training:
    from cfsp.recovery.schedule import Limit
    from cfsp.recovery.settings import Training

    return Training(
        Limit(args.steps, args.epochs, args.max_minutes),
        learning_rate=args.learning_rate,
        batch_windows=args.batch_windows,
        accumulate=args.accumulate,
        seqlen=args.seqlen,
        evaluations=args.evaluations,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
        bos=args.bos,
    )


def _teacher(args: argparse.Namespace) -> TeacherChoice | None:
    from cfsp.errors import UsageError
    from cfsp.recovery.loss import Distillation
    from cfsp.recovery.teacher import TeacherChoice

    if not 0 <= args.teacher_weight <= 1 or not 0 < args.temperature < float("inf"):
        raise UsageError(
            "expected --teacher-weight in [0, 1] and a positive --temperature, "
            f"found {args.teacher_weight} and {args.temperature}"
        )
    if args.teacher is None:
        if args.teacher_top_k is not None:
            raise UsageError("--teacher-top-k needs --teacher")
        return None
    return TeacherChoice(
        args.teacher, Distillation(args.teacher_weight, args.temperature), args.teacher_top_k
    )
