"""Study 9: which parts should go, at equal parameters?

    python studies/run.py 9 --texts DIR --out rows.json

For each share of the block parameters that stays, every choice of parts gives a model before and
after the standard repair. What goes of a choice is decided before repair, so that the same is
compared with and without one; `all` is what `cfsp prune` itself chooses after a repair, where
everything may go. Every step is a `cfsp` command that is printed. What is finished is not done
again: models stay beside the results, with what was measured of them.

Prints Markdown: perplexity as ratio to the dense model, the geometric mean over all texts and the
worst; KL to the dense model in nats per token, and its difference to `ffn` in the same state,
window by window, with standard errors; top-1 agreement in percent; and with `--tasks` the
accuracy - dense. A second table has what repair does not change: the share of the KV cache that is
left, and with `--rounds` speed as ratio to the dense model, all models interleaved in one run,
beside the ratio that FLOPs and bytes promise (ideal).
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cli import step
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.compare import Comparison, compare
from cfsp.quality.paired import Estimate, geometric_mean, mean_of_tasks
from cfsp.quality.results_file import MeasuredModel, read_models
from cfsp.speed.measuring import PHASES
from cfsp.speed.work import work_of
from conditions import conditions, parser_of_model
from results import Results

# What may go, as for `cfsp prune`.
CHOICES: dict[str, tuple[str, ...]] = {
    "ffn": ("--parts", "ffn"),
    "ffn,kv": ("--parts", "ffn,kv"),
    "ffn,attention": ("--parts", "ffn,attention"),
    "blocks": ("--parts", "blocks"),
    "blocks by influence": ("--parts", "blocks", "--set", "removal=influence"),
    "ffn,blocks": ("--parts", "ffn,blocks"),
    "all": ("--parts", "ffn,kv,attention,blocks"),
}
# Chosen after repair.
_BY_REPAIR = "all"
_SPEEDS = [f"{phase}{ideal}" for phase in PHASES for ideal in ("", ", ideal")]
_BEFORE, _AFTER, _TRAINED = "unrepaired", "repaired", "recovered"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, measure, print."""
    args = _parser().parse_args(arguments)
    args.models = args.models or args.out.with_suffix("")
    limits = {name: getattr(args, name) for name in ("seed", "tasks", "limit", "steps")}
    results = Results(args.out, conditions(args, **limits))
    rows = [row for stays in args.stays for row in _rows_of(args, results, stays)]
    values = ["mean", "worst", "KL", "KL - ffn", "equal", *(["tasks"] if args.tasks else [])]
    print(f"\n{_shown(rows, ['what goes', 'parameters', *values])}")
    rows = [row for stays in args.stays for row in _costs_of(args, results, stays)]
    print(f"\n{_shown(rows, ['KV cache', *(_SPEEDS if args.rounds else [])])}")


def _parser() -> argparse.ArgumentParser:
    found = parser_of_model("parts", __doc__.splitlines()[0])
    found.add_argument(
        "--models", type=Path, help="where pruned models go (default: beside the results)"
    )
    found.add_argument(
        "--stays", type=float, nargs="+", default=[0.75, 0.625, 0.5], help="of block parameters"
    )
    found.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="parts")
    found.add_argument("--seed", type=int, default=0, help="of the draw of calibration windows")
    found.add_argument("--rounds", type=int, default=0, help="of cfsp bench; 0: no speed")
    # Steps and not minutes: how many fit into minutes depends on what else the machine does.
    found.add_argument("--steps", type=int, default=0, help="of recovery, of each repaired one")
    found.add_argument("--tasks", default="", help="as for cfsp eval")
    found.add_argument("--task-data", type=Path, help="likewise")
    found.add_argument("--limit", type=int, default=200, help="documents of each task")
    return found


def _rows_of(args: argparse.Namespace, results: Results, stays: float) -> list[dict[str, Any]]:
    """Return the rows of one size, which are measured together."""
    states = [_BEFORE, _AFTER, *([_TRAINED] if args.steps else [])]
    models = [(parts, state) for parts in args.choices for state in states]
    keys = [{"stays": stays, "parts": parts, "state": state} for parts, state in models]
    if known := _known(results, keys):
        return known
    directories = [_pruned(args, stays, parts, state) for parts, state in models]
    measured = {each.name: each for each in _measured(args, stays, directories)}
    dense = measured[args.model]
    found = []
    for (_, state), key, directory in zip(models, keys, directories, strict=True):
        base = measured.get(str(_directory(args, stays, "ffn", state)))
        model = measured[str(directory)]
        found.append(results.measure(key, _figures, dense, model, base, directory))
    return found


def _known(results: Results, keys: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of these keys; none if some are missing, for they are measured together."""
    found = [row for key in keys for row in results.rows if key.items() <= row.items()]
    return found if len(found) == len(keys) else []


def _costs_of(args: argparse.Namespace, results: Results, stays: float) -> list[dict[str, Any]]:
    """Return what each choice costs to run at one size; speed is measured in one run."""
    state = f"{args.rounds} rounds" if args.rounds else "not timed"
    keys = [{"stays": stays, "parts": parts, "state": state} for parts in args.choices]
    if known := _known(results, keys):
        return known
    directories = [_pruned(args, stays, parts, _AFTER) for parts in args.choices]
    timed = _timed(args, directories) if args.rounds else [{} for _ in directories]
    dense = _cache_bytes(args.model)
    costs = [
        {"KV cache": f"{_cache_bytes(each) / dense:.0%}", **speed}
        for each, speed in zip(directories, timed, strict=True)
    ]
    return [results.measure(key, dict, each) for key, each in zip(keys, costs, strict=True)]


def _cache_bytes(model: str | Path) -> float:
    """Return the bytes of keys and values of a token, in 16 bits."""
    return work_of(open_checkpoint(model), head=False, itemsize=2).cache_bytes


def _timed(args: argparse.Namespace, directories: Sequence[Path]) -> list[dict[str, float]]:
    """Return the speed of these models over the dense one's, the median over rounds."""
    options = ("--prompt", 512, "--new-tokens", 16, "--rounds", args.rounds, "--json")
    with redirect_stdout(io.StringIO()) as printed:
        step("bench", args.model, *directories, *options)
    models = json.loads(printed.getvalue())["models"][1:]
    return [_speeds(model["workloads"][0]) for model in models]


def _speeds(measured: dict[str, Any]) -> dict[str, float]:
    keys = [(phase, key) for phase in PHASES for key in ("ratio", "ideal_ratio")]
    values = [round(measured[phase][key], 2) for phase, key in keys]
    return dict(zip(_SPEEDS, values, strict=True))


def target_of(source: Checkpoint, stays: float) -> float:
    """Return the share of all parameters that stays with this share of those of the blocks."""
    return 1 - (1 - stays) * sum(parameters_of_blocks(source)) / parameter_count(source)


def _directory(args: argparse.Namespace, stays: float, parts: str, state: str) -> Path:
    name = parts.replace(",", "-").replace(" ", "-")
    found: Path = args.models / f"{100 * stays:g}-{name}-{state}"
    return found


def _pruned(args: argparse.Namespace, stays: float, parts: str, state: str) -> Path:
    """Return the directory of a model, which is made if it is not there yet."""
    out = _directory(args, stays, parts, state)
    if (out / MANIFEST_FILE).is_file():
        return out
    if state == _TRAINED:
        pruned = _pruned(args, stays, parts, _AFTER)
        step("recover", pruned, "--steps", args.steps, "--out", out)
        return out
    text = [option for name in args.data for option in ("--data", name)]
    text += ["--samples", args.samples, "--seqlen", args.seqlen]
    text += ["--set", f"seed={args.seed}"] if args.seed else []
    effort = ("--effort", "fast" if state == _BEFORE else "standard")
    decides = _AFTER if parts == _BY_REPAIR else _BEFORE
    if state == decides:
        target = target_of(open_checkpoint(args.model), stays)
        what = (*CHOICES[parts], "--target-params", f"{target:.6f}")
        step(
            *("prune", args.model, *what, "--set", "block_metric=sensitivity"),
            *effort,
            *text,
            "--out",
            out,
        )
    else:
        plan = _pruned(args, stays, parts, decides) / PLAN_FILE
        step("prune", args.model, "--plan", plan, *effort, *text, "--out", out)
    return out


def _measured(
    args: argparse.Namespace, stays: float, directories: Sequence[Path]
) -> list[MeasuredModel]:
    """Return the dense model and these, measured in one run each of texts and of tasks."""
    text = [option for name in args.eval for option in ("--data", name)]
    files = [args.models / f"{100 * stays:g}-texts.json"]
    step(
        *("eval", *directories, "--against", args.model, *text, "--windows", args.windows),
        *("--seqlen", args.seqlen, "--out", files[0]),
    )
    if args.tasks:
        files.append(args.models / f"{100 * stays:g}-tasks.json")
        data = () if args.task_data is None else ("--task-data", args.task_data)
        whole = [each for each in directories if not each.name.endswith(_BEFORE)]
        step(
            *("eval", args.model, *whole, "--tasks", args.tasks, "--limit", args.limit, *data),
            *("--out", files[-1]),
        )
    return read_models(files)


def _figures(
    dense: MeasuredModel, model: MeasuredModel, base: MeasuredModel | None, directory: Path
) -> dict[str, Any]:
    """Return what a row says of a model beside the dense one and `ffn` alone."""
    found = compare(dense, model, dense)
    ratios = [math.exp(pair.loss.difference.value) for pair in found.texts]
    figures: dict[str, Any] = {
        "what goes": _in_words(PruningPlan.load(directory / PLAN_FILE)),
        "parameters": parameter_count(open_checkpoint(directory)),
        "mean": round(geometric_mean(ratios), 3),
        "worst": round(max(ratios), 3),
        "KL": _divergence(found, "second"),
        "equal": round(
            100 * mean_of_tasks([pair.agreed.second for pair in found.texts if pair.agreed]).value,
            1,
        ),
    }
    if base is not None:
        figures["KL - ffn"] = _divergence(compare(base, model, dense), "difference")
    if found.accuracy is not None:
        figures["tasks"] = _rounded(found.accuracy.difference.times(100), 3)
    return figures


def _divergence(found: Comparison, side: str) -> list[float | None]:
    pairs = [pair.divergence for pair in found.texts if pair.divergence is not None]
    return _rounded(mean_of_tasks([getattr(pair, side) for pair in pairs]), 3)


def _rounded(found: Estimate, digits: int) -> list[float | None]:
    error = None if found.stderr is None else round(found.stderr, digits)
    return [round(found.value, digits), error]


def _in_words(plan: PruningPlan) -> str:
    """Return what of each part goes; shares count what goes with whole blocks and attentions."""
    words = [plan.removed_in_words] if plan.removed_blocks or plan.removed_attentions else []
    if "ffn" in plan.parts and plan.ffn_sparsity:
        words.append(f"{plan.ffn_sparsity:.1%} of all FFN channels")
    if "kv" in plan.parts and plan.kv_sparsity:
        words.append(f"{plan.kv_sparsity:.1%} of all KV groups")
    return ", ".join(words)


def _shown(rows: Sequence[dict[str, Any]], values: Sequence[str]) -> str:
    """Return the rows as Markdown."""
    head = ["stays", "parts", "state", *values]
    text = ("state", "what goes")
    lines = [head, ["---"] * 2 + ["---" if name in text else "---:" for name in head[2:]]]
    for row in rows:
        cells = [f"{row['stays']:.1%}", row["parts"], row["state"]]
        lines.append([*cells, *(_cell(row.get(name)) for name in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3f}" + ("" if value[1] is None else f" ({value[1]:.3f})")
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
