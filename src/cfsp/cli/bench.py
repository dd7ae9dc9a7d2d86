"""`cfsp bench`: how fast models are, beside what their sizes promise."""

from __future__ import annotations

import argparse
from pathlib import PurePath
from typing import TYPE_CHECKING

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json, print_table
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.speed import Comparison, Workload
    from cfsp.speed.subjects import Subject

# Spelled out here, because their home is imported with torch; a test compares.
ENGINES = ("transformers", "compile", "llama.cpp", "openvino", "vllm")


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "bench",
        "time models against each other, beside the ratio that their sizes promise",
        "cfsp bench MODEL smaller --prompt 512 --new-tokens 32\n"
        "  cfsp bench --shape llama-2-7b --blocks 4 --sparsity 0.5 --dtype bfloat16",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="as for prune, or a .gguf file for llama.cpp; ratios are to the first",
    )
    shape = parser.add_argument_group("true shapes with random weights, instead of models")
    shape.add_argument("--shape", help="llama-2-7b, llama-3-8b, qwen2.5-7b, ...")
    shape.add_argument("--blocks", type=int, metavar="N", help="how many blocks (default: all)")
    shape.add_argument(
        "--sparsity",
        type=float,
        nargs="+",
        metavar="P",
        help="fractions of FFN channels to leave out, against the dense shape",
    )
    shape.add_argument("--multiple", type=int, metavar="N", help="as for prune")
    shape.add_argument(
        "--width", type=int, nargs="+", metavar="F", help="exact FFN widths instead of --sparsity"
    )
    shape.add_argument(
        "--head",
        choices=("with", "without"),
        help="time the language-model head (default: with, but without for a shape with fewer "
        "blocks than the model has); the ideal ratio counts it in the same way",
    )
    work = parser.add_argument_group("what to time")
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
            help=f"{what}; several are timed one after the other (default: {default})",
        )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--engine",
        default="transformers",
        choices=ENGINES,
        help="transformers eager (default), torch.compile with a static cache, or a runtime",
    )
    group.add_argument("--rounds", type=int, default=7, help="timed runs of each (default: 7)")
    group.add_argument(
        "--warmups", type=int, default=2, help="untimed runs of each (default: 2; compile: 3)"
    )
    group.add_argument(
        "--disturbance",
        type=float,
        default=0.05,
        metavar="F",
        help="measure a round again while other programs take more than this fraction of the "
        "processors (default: 0.05)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="(default: the engine's own)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps, auto (default: cpu)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="(default: the model's own; bfloat16 for a shape)",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Time and print."""
    from itertools import product

    from cfsp.speed import Conditions, Workload, compare_speed

    subjects = _subjects(args)
    workloads = [Workload(*values) for values in product(args.batch, args.prompt, args.new_tokens)]
    # With a static cache the second run compiles once more: the cache then exists already.
    warmups = max(args.warmups, 3) if args.engine == "compile" else args.warmups
    conditions = Conditions(
        args.engine,
        warmups,
        args.rounds,
        args.disturbance,
        args.device,
        args.dtype,
        args.threads,
    )
    comparison = compare_speed(subjects, workloads, conditions)
    if args.json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)


def _subjects(args: argparse.Namespace) -> list[Subject]:
    from cfsp.speed.shapes import ShapedModel
    from cfsp.speed.subjects import Subject

    if bool(args.models) == bool(args.shape):
        raise UsageError("expected models or a --shape, and not both")
    if args.models:
        if args.blocks or args.sparsity or args.width or args.multiple:
            raise UsageError("--blocks, --sparsity, --width and --multiple go with --shape only")
        # The last part of a path is enough, unless two are alike.
        short = [PurePath(name).name for name in args.models]
        labels = short if len(set(short)) == len(short) else args.models
        pairs = zip(args.models, labels, strict=True)
        return [Subject(name, label, head=args.head != "without") for name, label in pairs]
    dense = ShapedModel(args.shape, args.blocks)
    shaped = [
        dense,
        *(ShapedModel(args.shape, args.blocks, p, args.multiple) for p in args.sparsity or ()),
        *(ShapedModel(args.shape, args.blocks, width=width) for width in args.width or ()),
    ]
    head = args.head == "with" or (args.head is None and dense.whole)
    return [Subject(each, each.label, head) for each in shaped]


def print_comparison(comparison: Comparison) -> None:
    """Print one table of sizes and one for each workload."""
    print_table(
        ("model", "parameters", "on disk", "peak memory", "load"),
        [
            (
                model.label,
                human_count(model.footprint.parameters),
                human_bytes(model.footprint.disk_bytes),
                human_bytes(model.memory.device_bytes or model.memory.resident_bytes),
                f"{model.load_seconds:.1f} s",
            )
            for model in comparison.models
        ],
    )
    for workload in comparison.workloads:
        print(
            f"\n{workload.describe()}; other programs took "
            f"{comparison.disturbance[workload]:.0%} of the processors, "
            f"{comparison.rounds_given_up[workload]} rounds given up because they took more"
        )
        _print_workload(comparison, workload)
    facts = ", ".join(f"{key} {value}" for key, value in comparison.models[0].facts.items())
    conditions = comparison.conditions
    print(
        f"\n{facts}; medians of {conditions.rounds} rounds in turns after {conditions.warmups} "
        "warm-ups, with the lowest and highest; ratio: median of the ratios within a round; "
        "ideal: by FLOPs (prefill) and by bytes read (decode)"
    )


def _print_workload(comparison: Comparison, workload: Workload) -> None:
    rows = []
    for phase in ("prefill", "decode"):
        for model in comparison.models:
            speed = model.speeds[workload][phase]
            first_token = 1000 * model.seconds_to_first_token[workload]
            rates = speed.tokens_per_second
            rows.append(
                (
                    f"{phase}  {model.label}",
                    f"{speed.median_tokens_per_second:,.1f}",
                    f"{min(rates):,.1f} - {max(rates):,.1f}",
                    f"{first_token:,.0f} ms" if phase == "prefill" else "",
                    f"{speed.median_ratio:.3f}x",
                    f"{min(speed.ratios):.3f} - {max(speed.ratios):.3f}",
                    f"{speed.ideal_ratio:.3f}x",
                    f"{speed.median_ratio / speed.ideal_ratio:.0%}",
                )
            )
    head = ("phase, model", "tokens/s", "range", "first token", "ratio", "range", "ideal", "of it")
    print_table(head, rows)
