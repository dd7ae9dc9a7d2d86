"""Where should trainable parameters go? Allocation and method, over seeds.

    python benchmarks/recovery_study.py PRUNED --data A --data B --eval C --eval D

Compares rank allocations (importance, uniform, inverse) at equal trainable
parameters (the mean rank of each is chosen so that the counts agree as nearly as whole ranks
allow), and LoRA against full training at equal steps and at equal time. Every arm trains with
every seed, which changes the order of windows and the adapters' start. Runs take turns, so that a
machine that slows down slows all arms. Prints a Markdown table of perplexity, mean and spread
(half the range), and the paired difference to uniform allocation, which is what the seeds' own
noise cancels out of.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint
from cfsp.recovery.adaptation import attach
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.settings import (
    RANK_ALLOCATIONS,
    Adaptation,
    Limit,
    RecoverSettings,
    Training,
)
from cfsp.recovery.targets import targets_of
from cfsp.recovery.training import load_to_train
from cfsp.settings import EvaluationText
from cfsp.streaming.runtime import versions


@dataclass(frozen=True)
class Arm:
    """One way to recover."""

    name: str
    adaptation: Adaptation
    limit: Limit
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """What one run of an arm gave."""

    arm: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    perplexity: dict[str, float]


def trainable_parameters(source: Checkpoint, adaptation: Adaptation) -> int:
    """Return how many parameters an adaptation trains."""
    model = load_to_train(source, torch.device("cpu"), "auto")
    adapted = attach(model, source.architecture, targets_of(source, adaptation), adaptation.scale)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def at_equal_parameters(source: Checkpoint, rank: float) -> Iterator[Adaptation]:
    """Yield an adaptation for each allocation, with as many parameters as the uniform one."""
    blocks = source.config.num_hidden_layers
    target = trainable_parameters(source, Adaptation(rank=rank, allocation="uniform"))
    for allocation in RANK_ALLOCATIONS:
        adaptation = Adaptation(rank=rank, allocation=allocation)
        if allocation != "uniform":
            total = round(rank * blocks)
            per_rank = trainable_parameters(source, adaptation) / total
            near = round(target / per_rank)
            adaptation = min(
                (replace(adaptation, rank=t / blocks) for t in range(near - 2, near + 3)),
                key=lambda a: abs(trainable_parameters(source, a) - target),
            )
        yield adaptation


def arms_of(source: Checkpoint, args: argparse.Namespace) -> list[Arm]:
    """Return what is compared."""
    steps = Limit(steps=args.steps)
    arms = [
        Arm(f"LoRA, {a.allocation}", a, steps, args.lora_rate)
        for a in at_equal_parameters(source, args.rank)
    ]
    arms.append(Arm("full, equal steps", Adaptation("full"), steps, args.full_rate))
    if args.minutes:
        limit = Limit(minutes=args.minutes)
        lora = Adaptation(rank=args.rank, allocation="importance")
        arms.append(Arm(f"LoRA, {args.minutes:g} minutes", lora, limit, args.lora_rate))
        full = Adaptation("full")
        arms.append(Arm(f"full, {args.minutes:g} minutes", full, limit, args.full_rate))
    return arms


def run(source: Checkpoint, arm: Arm, seed: int, args: argparse.Namespace) -> Result:
    """Recover once."""
    with tempfile.TemporaryDirectory() as directory:
        report = recover_checkpoint(
            source,
            Path(directory) / "out",
            RecoverSettings(
                tuple(args.data),
                Training(
                    arm.limit,
                    learning_rate=arm.learning_rate,
                    batch_windows=args.batch_windows,
                    seqlen=args.seqlen,
                    evaluations=1,
                    seed=seed,
                ),
                arm.adaptation,
                evaluation=EvaluationText(tuple(args.eval), args.windows),
            ),
        )
    return Result(
        arm.name,
        seed,
        report.trainable_parameters,
        report.steps,
        report.seconds["train"],
        {text: value["after"] for text, value in report.perplexity.items()},
    )


def main() -> None:
    """Run all arms with all seeds, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint that cfsp pruned")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--eval", action="append", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--rank", type=float, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, help="also compare LoRA and full at equal time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--full-rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path, help="append every run to this file, as JSON lines")
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    results = []
    for seed in range(args.seeds):
        for arm in arms_of(source, args):
            results.append(run(source, arm, seed, args))
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(vars(results[-1])) + "\n")
    found = versions()
    print(
        f"{args.model}: {args.steps} steps of {args.batch_windows} x {args.seqlen} tokens, "
        f"{args.seeds} seeds, perplexity on the first {args.windows} windows of 1024; learning "
        f"rate {args.lora_rate:g} (LoRA), {args.full_rate:g} (full); torch {found['torch']}, "
        f"transformers {found['transformers']}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print_table(results, args.eval)


def print_table(results: Sequence[Result], texts: Sequence[str]) -> None:
    """Print mean and spread of every arm, and its paired difference to uniform allocation."""
    uniform = {r.seed: r for r in results if r.arm == "LoRA, uniform"}
    cells = " | ".join(f"{text} | - uniform" for text in texts)
    print(f"| | parameters | steps | minutes | {cells} |")
    print("|---|---:|---:|---:|" + "---:|" * (2 * len(texts)))
    for name in dict.fromkeys(result.arm for result in results):
        arm = [result for result in results if result.arm == name]
        row = [
            name,
            f"{arm[0].parameters:,}",
            f"{mean(r.steps for r in arm):.0f}",
            f"{mean(r.seconds for r in arm) / 60:.1f}",
        ]
        for text in texts:
            values = [r.perplexity[text] for r in arm]
            gaps = [r.perplexity[text] - uniform[r.seed].perplexity[text] for r in arm]
            row += [_spread(values, ""), _spread(gaps, "+")]
        print("| " + " | ".join(row) + " |")


def _spread(values: Sequence[float], sign: str) -> str:
    return f"{mean(values):{sign}.2f} ± {(max(values) - min(values)) / 2:.2f}"


if __name__ == "__main__":
    main()
