"""Prune SmolLM2-135M on text of many kinds and show gain and loss.

cfsp demo --out pruned-demo --sparsity 0.3
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cfsp.cli.bench import print_comparison
from cfsp.cli.options import Parser, kind_of, typed_command
from cfsp.cli.output import Told, print_plan
from cfsp.cli.prune import print_report
from cfsp.processes import check_is_alone
from cfsp.settings import (
    Budget,
    CalibrationText,
    EvaluationText,
    PruneSettings,
    TimingConditions,
    Workload,
    fraction,
)


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("pruned-demo"), help="(default: pruned-demo)"
    )
    parser.add_argument(
        "--sparsity", type=kind_of(fraction), default=0.3, metavar="P", help="(default: 0.3)"
    )


def run(args: argparse.Namespace) -> Told:
    """Prune, evaluate and time, in a few minutes on two cores and without a hub."""
    check_is_alone("cfsp demo")
    # Nine windows of each kind, short ones: so it takes minutes on a busy machine, too.
    text = CalibrationText(samples=81, seqlen=128)
    evaluation = EvaluationText(("mixed", "python-docs"), windows=9, seqlen=256)
    settings = PruneSettings(Budget(args.sparsity), text=text, evaluation=evaluation)
    # Before torch is there: threads that wait by spinning take six times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from cfsp.checkpoint.locating import DEMO_NAME, open_checkpoint
    from cfsp.checkpoint.output import check_output_is_free
    from cfsp.pipeline import prune_checkpoint
    from cfsp.result.manifest import add_to_manifest
    from cfsp.result.page.page import write_report
    from cfsp.speed.bench import compare_speed
    from cfsp.speed.subjects import Subject

    # Before the model is converted, which takes a while.
    check_output_is_free(args.out)
    source, page = open_checkpoint(DEMO_NAME), args.out / "report.html"
    report = prune_checkpoint(source, args.out, settings, command=typed_command(args))
    speed = compare_speed(
        [Subject(source.directory, "dense"), Subject(args.out, "pruned")],
        [Workload()],
        TimingConditions(warmups=1, rounds=5),
    )
    add_to_manifest(args.out, {"speed": speed.to_json()})
    write_report([args.out], page)

    def say() -> None:
        print_plan(report.plan)
        print()
        print_report(report)
        print()
        print_comparison(speed)
        print(
            "\nperplexity of mixed is on documents that were not calibrated on; python-docs is a "
            "text of another kind\nthe model card, with the way to load it: "
            f"{args.out / 'README.md'}\nthe report, to open in a browser: {page}"
        )

    return {**report.to_json(), "speed": speed.to_json(), "page": str(page)}, say
