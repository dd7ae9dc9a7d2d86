"""Zero-shot table of several checkpoints, offline, through lm-evaluation-harness.

    python benchmarks/zero_shot.py --task-data DIR/tasks --limit 500 \
        dense=demo 20%=RUNS/plain20 50%=RUNS/plain50 restored=RUNS/restored50

Prints Markdown: a row for each checkpoint, a column for each task (acc_norm where the task has
it, else acc), and the mean over tasks. With --json FILE the scores of each finished checkpoint
are kept there, and a second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from cfsp.quality.evaluate import evaluate_models
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.settings import Compute, EvaluationText

TASKS = "piqa,arc_easy,arc_challenge,openbookqa,boolq"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    selection = TaskSelection(
        tuple(args.tasks.split(",")), args.limit, args.shots, args.task_data, args.batch
    )
    runner = TaskRunner.of(selection)
    conditions = {**runner.conditions(), "tasks": args.tasks, "dtype": args.dtype}
    kept = _read(args.json, conditions)
    for checkpoint in args.checkpoints:
        label, _, model = checkpoint.partition("=")
        if label not in kept:
            texts = EvaluationText()
            kept[label] = evaluate_models([model], texts, Compute(dtype=args.dtype), runner)[0]
            if args.json:
                args.json.write_text(json.dumps({"conditions": conditions, "models": kept}))
    _print({label: kept[label] for label in (c.partition("=")[0] for c in args.checkpoints)})
    first = next(iter(kept.values()))
    versions = ", ".join(f"{task} {scores['version']}" for task, scores in first["tasks"].items())
    print(
        f"\n{conditions['harness']}, task versions {versions}, data: {conditions['task_data']}, "
        f"{'all' if args.limit is None else f'first {args.limit}'} documents of each task, "
        f"{args.shots or 0} shots, {first['dtype']}, batches of {args.batch}, "
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


def _read(path: Path | None, conditions: dict[str, Any]) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    models: dict[str, Any] = stored["models"] if stored["conditions"] == conditions else {}
    return models


def _print(models: dict[str, Any]) -> None:
    tasks = list(next(iter(models.values()))["tasks"])
    first = next(iter(models.values()))["tasks"]
    metrics = {task: "acc_norm" if "acc_norm" in first[task] else "acc" for task in tasks}
    print("| | parameters | " + " | ".join(f"{t} ({metrics[t]})" for t in tasks) + " | mean |")
    print("|---|---:|" + "---:|" * (len(tasks) + 1))
    for label, model in models.items():
        scores = [model["tasks"][task] for task in tasks]
        values = [s[metrics[t]] for s, t in zip(scores, tasks, strict=True)]
        errors = [s[f"{metrics[t]}_stderr"] for s, t in zip(scores, tasks, strict=True)]
        cells = " | ".join(
            f"{100 * v:.1f} ± {100 * e:.1f}" for v, e in zip(values, errors, strict=True)
        )
        mean = 100 * sum(values) / len(values)
        print(f"| {label} | {model['parameters'] / 1e6:.1f}M | {cells} | {mean:.1f} |")


if __name__ == "__main__":
    main()
