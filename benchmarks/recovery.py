"""Time per token and memory of recovery, against plain Trainer + PEFT on the same model.

    python benchmarks/recovery.py PRUNED --data DIR/wikitext2/validation.parquet

Both train LoRA of the same mean rank on the same windows with the same arguments of the Trainer;
plain is `AutoModelForCausalLM`, `LoraConfig(target_modules="all-linear")` and the model's own
loss. Each run is a process of its own, the two take turns, and the ratio is taken within a round.
Time is from the end of the second step to the end of the last; memory is the peak of the process
by then. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import cfsp
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.recovery.adaptation import attach
from cfsp.recovery.data import WindowData, read_text
from cfsp.recovery.loss import loss_inside
from cfsp.recovery.schedule import StepSchedule
from cfsp.recovery.settings import Adaptation, Limit, Training
from cfsp.recovery.targets import targets_of
from cfsp.recovery.training import load_to_train, train, training_arguments
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.runtime import versions
from cfsp.text.tokenizers import load_tokenizer

_WARM_UP_STEPS = 2


class Meter(TrainerCallback):
    """Notes time and memory, and stops the run before it evaluates."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.facts: dict[str, float] = {}
        self._started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        if state.global_step == _WARM_UP_STEPS:
            self._started = time.perf_counter()
        if state.global_step == self.steps:
            seconds = time.perf_counter() - self._started
            self.facts = {
                "seconds_per_step": seconds / (self.steps - _WARM_UP_STEPS),
                "peak_bytes": peak_rss_bytes(),
            }
            if torch.cuda.is_available():
                self.facts["peak_bytes"] = torch.cuda.max_memory_allocated()
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False


def measure(kind: str, args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Train a few steps and return seconds per step and peak bytes."""
    source = open_checkpoint(args.model)
    device = cfsp.checkpoint.loading.compute_device("auto")
    text = read_text(args.data, load_tokenizer(source.directory), seqlen=args.seqlen)
    training = Training(
        Limit(steps=args.steps + 1),
        learning_rate=1e-3,
        batch_windows=args.batch_windows,
        seqlen=args.seqlen,
        evaluations=1,
    )
    meter = Meter(args.steps)
    torch.manual_seed(0)
    if kind == "cfsp":
        model = load_to_train(source, device, "auto")
        adaptation = Adaptation(rank=args.rank)
        targets = targets_of(source, adaptation)
        adapted = attach(model, source.architecture, targets, adaptation.scale)
        schedule = StepSchedule(args.steps + 1, 1, time.monotonic())
        with loss_inside(model) as loss:
            train(
                adapted,
                text,
                training,
                schedule=schedule,
                loss=loss,
                directory=directory,
                callbacks=[meter],
            )
    else:
        _train_plainly(source.directory, args.rank, text.train, training, directory, meter)
    return meter.facts


def _train_plainly(
    checkpoint: Path,
    rank: int,
    data: WindowData,
    training: Training,
    directory: Path,
    meter: Meter,
) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = training_arguments(training, directory, meter.steps + 1, model, begins=False)
    arguments.load_best_model_at_end = False
    arguments.eval_strategy = "no"
    Trainer(get_peft_model(model, config), arguments, train_dataset=data, callbacks=[meter]).train()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint that cfsp pruned")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("plain", "cfsp"), help="one run, printed as JSON")
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(measure(args.only, args, Path(directory))))
        return

    runs: dict[str, list[dict[str, float]]] = {"plain": [], "cfsp": []}
    for _ in range(args.rounds):
        for kind, results in runs.items():
            command = [sys.executable, *sys.argv, "--only", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    _print(args, runs)


def _print(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    found = versions()
    tokens = args.batch_windows * args.seqlen
    print(
        f"{args.model}: LoRA, mean rank {args.rank}, {args.batch_windows} x {args.seqlen} tokens "
        f"a step, {args.steps - _WARM_UP_STEPS} steps timed, {args.rounds} rounds; "
        f"torch {found['torch']}, transformers {found['transformers']}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| | tokens/s (median) | peak memory | time per token / plain | memory / plain |")
    print("|---|---:|---:|---:|---:|")
    for kind, results in runs.items():
        speeds = [tokens / r["seconds_per_step"] for r in results]
        ratios = {
            key: [a[key] / b[key] for a, b in zip(results, runs["plain"], strict=True)]
            for key in ("seconds_per_step", "peak_bytes")
        }
        time_ratios = ratios["seconds_per_step"]
        memory = median(r["peak_bytes"] for r in results) / 2**20
        print(
            f"| {kind} | {median(speeds):,.0f} | {memory:,.0f} MiB "
            f"| {median(time_ratios):.2f} ({min(time_ratios):.2f} to {max(time_ratios):.2f}) "
            f"| {median(ratios['peak_bytes']):.2f} |"
        )


if __name__ == "__main__":
    main()
