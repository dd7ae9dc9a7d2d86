"""`cfsp recover`: train a pruned checkpoint, most where the coarse importance is high."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json, print_table
from cfsp.processes import is_first_process, leave_processes
from cfsp.recovery.settings import (
    LEARNING_RATES,
    METHODS,
    RANK_ALLOCATIONS,
    TARGETS,
    Adaptation,
    Distillation,
    Training,
)
from cfsp.settings import BOS, EvaluationText

if TYPE_CHECKING:
    from cfsp.recovery.recover_report import RecoverReport

logger = logging.getLogger(__name__)

# What only a researcher sets: keyword of `cfsp.recover` -> its argument. Not in the help.
RESEARCH: dict[str, dict[str, Any]] = {
    "targets": {"choices": TARGETS, "default": Adaptation.targets},
    "rank_allocation": {"choices": RANK_ALLOCATIONS, "default": Adaptation.allocation},
    "scale": {"type": float, "default": Adaptation.scale},
    "teacher_weight": {"type": float, "default": Distillation.weight},
    "temperature": {"type": float, "default": Distillation.temperature},
    "accumulate": {"type": int, "default": Training.accumulate},
    "evaluations": {"type": int, "default": Training.evaluations},
    "warm_up": {"type": float, "default": Training.warm_up},
    "weight_decay": {"type": float, "default": Training.weight_decay},
    "eval_windows": {"type": int, "default": EvaluationText.windows},
    "seed": {"type": int, "default": Training.seed},
    "bos": {"choices": BOS, "default": Training.bos},
    "dtype": {"choices": ("auto", "float32", "bfloat16"), "default": "auto"},
}


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "recover",
        "train a pruned checkpoint to win back quality and write it in the same layout",
        "cfsp recover smaller --data wikitext2 --data c4 --max-minutes 30 --out recovered\n\n"
        "After a kill the same command goes on where it was.",
    )
    arguments.add_model(parser)
    parser.add_argument("--out", required=True, type=Path, help="new directory")
    arguments.add_json(parser)
    _add_text(parser)
    _add_length(parser)
    _add_training(parser)
    for name, argument in RESEARCH.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **argument)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        action="append",
        metavar="TEXT",
        help="to train on: as for prune, or conversations (column `messages`, of which answers "
        "are learnt); repeatable",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        default=Training.seqlen,
        metavar="T",
        help="tokens in a window (default: %(default)s)",
    )
    group.add_argument(
        "--eval",
        action="append",
        metavar="TEXT",
        help="measure perplexity on this text, before and after; repeatable",
    )


def _add_length(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how long (one of these)")
    only = group.add_mutually_exclusive_group(required=True)
    only.add_argument(
        "--max-minutes",
        type=float,
        metavar="M",
        help="for everything: loading, training, measuring, writing",
    )
    only.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    only.add_argument("--epochs", type=float, metavar="N", help="passes over the text")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--method",
        default=Adaptation.method,
        choices=METHODS,
        help="low-rank adapters (lora, default), the same with trained lengths (dora), or all "
        "projections in full: better in the same time, and needs 16 bytes for each parameter",
    )
    group.add_argument(
        "--rank",
        type=float,
        default=Adaptation.rank,
        metavar="R",
        help="of the adapters, mean over blocks (default: %(default)g)",
    )
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    group.add_argument(
        "--learning-rate", type=float, metavar="LR", help=f"at its peak (default: {rates})"
    )
    group.add_argument(
        "--batch-windows",
        type=int,
        default=Training.batch_windows,
        metavar="N",
        help="windows in a step, on each process (default: %(default)s)",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, a third more time"
    )
    group.add_argument(
        "--teacher",
        metavar="MODEL",
        help="distil from the dense model (default: none; in the same time, text alone wins)",
    )
    group.add_argument(
        "--keep-adapter", action="store_true", help="also write the PEFT adapter, into OUT/adapter"
    )
    group.add_argument("--device", default="auto", help="(default: an accelerator if any)")


def run(args: argparse.Namespace) -> None:
    """Recover."""
    # Importing torch is a part of what the user waits for.
    started = time.monotonic()
    arguments.check_texts(args.data, args.eval)

    from cfsp.recovery.api import recover

    if args.resume:
        logger.info("--resume is not needed: the same command goes on where a killed one was")
    report = recover(
        args.model,
        revision=args.revision,
        out=args.out,
        data=args.data or (),
        method=args.method,
        rank=args.rank,
        learning_rate=args.learning_rate,
        steps=args.steps,
        epochs=args.epochs,
        max_minutes=args.max_minutes,
        teacher=args.teacher,
        eval=args.eval or (),
        seqlen=args.seqlen,
        batch_windows=args.batch_windows,
        gradient_checkpointing=args.gradient_checkpointing,
        keep_adapter=args.keep_adapter,
        device=args.device,
        command=arguments.typed_command(),
        started=started,
        **{name: getattr(args, name) for name in RESEARCH},
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
