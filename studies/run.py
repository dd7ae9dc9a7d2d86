"""Study 9: which parts should go, at equal parameters?

    python studies/run.py 9 --texts DIR

For each share of the block parameters that stays, every choice of parts gives a model before and
after the standard repair. What goes of a choice is decided before repair, so that the same is
compared with and without one; `all` is what `cfsp prune` itself chooses after a repair, where
everything may go. Every step is a `cfsp` command that is printed. What is finished is not done
again: models stay beside the results, with what was measured of them, and rows that are in
`results/` are not measured again, so that this prints the tables of docs/STUDIES.md. `--out FILE`
measures them anew.

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
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cli import step
from cfsp.errors import CfspError, OutputError, TextError, UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.compare import compare
from cfsp.quality.paired import Number, mean_of_tasks
from cfsp.quality.results_file import MeasuredModel, read_models

TEXTS = (
    "wikitext2/test.parquet", "c4/validation.jsonl", "domains/arxiv.jsonl",
    "domains/commoncrawl.jsonl", "domains/github.jsonl", "domains/stackexchange.jsonl",
    "domains/wiki.jsonl",
)  # fmt: skip
PUBLISHED = Path(__file__).parent / "results/parts.json"
# What may go, as for `cfsp prune`.
CHOICES: dict[str, tuple[str, ...]] = {
    "ffn": ("--parts", "ffn"),
    "ffn,kv": ("--parts", "ffn,kv"),
    # No longer options: their published rows are printed, and not measured anew.
    "ffn,attention": (),
    "blocks": ("--parts", "blocks"),
    "blocks by influence": (),
    "ffn,blocks": ("--parts", "ffn,blocks"),
    "all": ("--parts", "ffn,kv,blocks"),
}
PHASES = ("prefill", "decode")
# Chosen after repair.
_BY_REPAIR = "all"
_SPEEDS = [f"{phase}{ideal}" for phase in PHASES for ideal in ("", ", ideal")]
_BEFORE, _AFTER, _TRAINED = "unrepaired", "repaired", "recovered"

Row = dict[str, Any]


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults, but not None: what that means is in the help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Results:
    """The rows of the study in a JSON file; one that is there is not measured again."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self._path, self._conditions = path, dict(conditions)
        self.rows: list[Row] = []
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["conditions"] != self._conditions:
                raise OutputError(
                    f"{path} was measured under other conditions ({found['conditions']}); choose "
                    "another --out"
                )
            self.rows = found["rows"]

    def known(self, keys: Sequence[Row]) -> list[Row]:
        """Return the rows of these keys; none if some are missing: they are measured together."""
        found = [row for key in keys for row in self.rows if key.items() <= row.items()]
        return found if len(found) == len(keys) else []

    def add(self, key: Row, figures: Row) -> Row:
        """Add a row and save all of them, unless there is one of this key; return it."""
        for row in self.known([key]):
            return row
        row = {**key, **figures}
        self.rows.append(row)
        # One row a line, so that a difference between two runs shows.
        lines = ",\n    ".join(map(json.dumps, self.rows))
        conditions = json.dumps(self._conditions, indent=4).replace("\n", "\n  ")
        text = f'{{\n  "conditions": {conditions},\n  "rows": [\n    {lines}\n  ]\n}}\n'
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, text.encode())
        print(json.dumps(row), flush=True)
        return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status: 2 for an error that the user can cure."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.data, args.eval = args.data or ["mixed"], args.eval or _texts_in(args.texts)
        args.choices = args.choices or usual_choices(args.out)
        _run(args)
    except CfspError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="studies/run.py",
        description=__doc__.splitlines()[0],
        formatter_class=_Defaults,
    )
    found.add_argument("study", choices=["9"], help="its number in docs/STUDIES.md")
    found.add_argument(
        "--texts", metavar="DIR", type=Path, help="with wikitext2/, c4/ and domains/"
    )
    found.add_argument("--model", default="demo", help="as for cfsp prune")
    found.add_argument("--data", action="append", help="calibration text (default: mixed)")
    found.add_argument("--eval", action="append", help="text to measure on (default: of --texts)")
    found.add_argument("--samples", type=int, default=36, help="calibration windows")
    found.add_argument("--seqlen", type=int, default=1024, help="tokens of a window")
    found.add_argument("--windows", type=int, default=4, help="windows to measure on, per text")
    found.add_argument(
        "--out", type=Path, default=PUBLISHED, help="results; pruned models lie beside"
    )
    found.add_argument("--stays", type=float, nargs="+", default=[0.625, 0.5], help="of blocks")
    found.add_argument(
        "--choices", nargs="+", choices=CHOICES, help=f"parts (default: all but {_BY_REPAIR!r})"
    )
    found.add_argument("--seed", type=int, default=0, help="of the draw of calibration windows")
    found.add_argument("--rounds", type=int, default=5, help="of cfsp bench; 0: no speed")
    # Steps and not minutes: how many fit into minutes depends on what else the machine does.
    found.add_argument("--steps", type=int, default=0, help="of recovery, of each repaired one")
    found.add_argument("--tasks", default="", help="as for cfsp eval")
    found.add_argument("--task-data", type=Path, help="likewise")
    found.add_argument("--limit", type=int, default=200, help="documents of each task")
    return found


def usual_choices(out: Path) -> list[str]:
    """Return those of which rows are published, or those that can be measured into a new file."""
    can_be = [parts for parts, options in CHOICES.items() if options or out == PUBLISHED]
    return [parts for parts in can_be if parts != _BY_REPAIR]


def _texts_in(directory: Path | None) -> list[str]:
    if directory is None:
        raise TextError("expected --texts, a directory with wikitext2/, c4/ and domains/")
    for path in (directory / name for name in TEXTS):
        if not path.is_file():
            raise TextError(f"{path} is not there; --texts is a directory that has it")
    return [str(directory / name) for name in TEXTS]


def _run(args: argparse.Namespace) -> None:
    """Prune, measure, print."""
    conditions = {
        "data": [label(text) for text in args.data],
        "eval": [label(text) for text in args.eval],
        **{name: getattr(args, name) for name in ("samples", "seqlen", "windows")},
        "model": Path(args.model).name,  # a path says nothing elsewhere
        **{name: getattr(args, name) for name in ("seed", "tasks", "limit", "steps")},
    }
    results = Results(args.out, conditions)
    rows = [row for stays in args.stays for row in _rows_of(args, results, stays)]
    values = ["mean", "worst", "KL", "KL - ffn", "equal", *(["tasks"] if args.tasks else [])]
    print(f"\n{_shown(rows, ['what goes', 'parameters', *values])}")
    rows = [row for stays in args.stays for row in _costs_of(args, results, stays)]
    print(f"\n{_shown(rows, ['KV cache', *(_SPEEDS if args.rounds else [])])}")


def label(text: str) -> str:
    """Return a text's name without what is this machine's: the last two parts of a path."""
    path = Path(text)
    return "/".join([*path.parts[-2:-1], path.stem]) if path.exists() else text


def _rows_of(args: argparse.Namespace, results: Results, stays: float) -> list[Row]:
    """Return the rows of one size, which are measured together."""
    states = [_BEFORE, _AFTER, *([_TRAINED] if args.steps else [])]
    models = [(parts, state) for parts in args.choices for state in states]
    keys = [{"stays": stays, "parts": parts, "state": state} for parts, state in models]
    if known := results.known(keys):
        return known
    directories = _made(args, stays, models)
    measured = {each.name: each for each in _measured(args, stays, directories)}
    dense = measured[args.model]
    found = []
    for (_, state), key, directory in zip(models, keys, directories, strict=True):
        base = measured.get(str(_directory(args, stays, "ffn", state)))
        figures = _figures(dense, measured[str(directory)], base, directory)
        found.append(results.add(key, figures))
    return found


def _costs_of(args: argparse.Namespace, results: Results, stays: float) -> list[Row]:
    """Return what each choice costs to run at one size; speed is measured in one run."""
    state = f"{args.rounds} rounds" if args.rounds else "not timed"
    keys = [{"stays": stays, "parts": parts, "state": state} for parts in args.choices]
    if known := results.known(keys):
        return known
    directories = _made(args, stays, [(parts, _AFTER) for parts in args.choices])
    timed = _timed(args, directories) if args.rounds else [{} for _ in directories]
    caches = [_kv_groups(each) / _kv_groups(args.model) for each in directories]
    return [
        results.add(key, {"KV cache": f"{cache:.0%}", **speed})
        for key, cache, speed in zip(keys, caches, timed, strict=True)
    ]


def _kv_groups(model: str | Path) -> int:
    """Return how many KV groups the attention layers have together."""
    units = open_checkpoint(model, parts=("kv",)).units
    return sum(unit.width for unit in units if unit.part == "kv")


def _timed(args: argparse.Namespace, directories: Sequence[Path]) -> list[dict[str, float]]:
    """Return the speed of these models over the dense one's, the median over rounds."""
    options = ("--prompt", 512, "--new-tokens", 16, "--rounds", args.rounds, "--json")
    with redirect_stdout(io.StringIO()) as printed:
        step("bench", args.model, *directories, *options)
    keys = [(phase, key) for phase in PHASES for key in ("ratio", "ideal_ratio")]
    of_models = [each["workloads"][0] for each in json.loads(printed.getvalue())["models"][1:]]
    values = [[round(measured[phase][key], 2) for phase, key in keys] for measured in of_models]
    return [dict(zip(_SPEEDS, each, strict=True)) for each in values]


def target_of(source: Checkpoint, stays: float) -> float:
    """Return the share of all parameters that stays with this share of those of the blocks."""
    return 1 - (1 - stays) * sum(parameters_of_blocks(source)) / source.parameter_count


def _directory(args: argparse.Namespace, stays: float, parts: str, state: str) -> Path:
    name = parts.replace(",", "-").replace(" ", "-")
    found: Path = args.out.with_suffix("") / f"{100 * stays:g}-{name}-{state}"
    return found


def _made(args: argparse.Namespace, stays: float, models: Sequence[tuple[str, str]]) -> list[Path]:
    """Return the directories of models by choice and state, which all can be made."""
    for parts, _ in models:
        if not CHOICES[parts]:
            raise UsageError(f"{parts} can't be measured anew; leave it out by --choices")
    return [_pruned(args, stays, parts, state) for parts, state in models]


def _pruned(args: argparse.Namespace, stays: float, parts: str, state: str) -> Path:
    """Return the directory of a model, which is made if it is not there yet."""
    out = _directory(args, stays, parts, state)
    if (out / MANIFEST_FILE).is_file():
        return out
    if state == _TRAINED:
        pruned = _pruned(args, stays, parts, _AFTER)
        step("recover", pruned, "--steps", args.steps, "--out", out)
        return out
    how = [option for name in args.data for option in ("--data", name)]
    how += ["--samples", args.samples, "--seqlen", args.seqlen]
    how += ["--set", f"seed={args.seed}"] if args.seed else []
    how += ["--effort", "fast" if state == _BEFORE else "standard", "--out", out]
    decides = _AFTER if parts == _BY_REPAIR else _BEFORE
    if state == decides:
        target = target_of(open_checkpoint(args.model), stays)
        what = (*CHOICES[parts], "--target-params", f"{target:.6f}")
        step("prune", args.model, *what, "--set", "block_metric=sensitivity", *how)
    else:
        plan = _pruned(args, stays, parts, decides) / PLAN_FILE
        step("prune", args.model, "--plan", plan, *how)
    return out


def _measured(
    args: argparse.Namespace, stays: float, directories: Sequence[Path]
) -> list[MeasuredModel]:
    """Return the dense model and these, measured in one run each of texts and of tasks."""
    text = [option for name in args.eval for option in ("--data", name)]
    beside = args.out.with_suffix("")
    files = [beside / f"{100 * stays:g}-texts.json"]
    step(
        *("eval", *directories, "--against", args.model, *text, "--windows", args.windows),
        *("--seqlen", args.seqlen, "--out", files[0]),
    )
    if args.tasks:
        files.append(beside / f"{100 * stays:g}-tasks.json")
        data = () if args.task_data is None else ("--task-data", args.task_data)
        whole = [each for each in directories if not each.name.endswith(_BEFORE)]
        step(
            *("eval", args.model, *whole, "--tasks", args.tasks, "--limit", args.limit, *data),
            *("--out", files[-1]),
        )
    return read_models(files)


def _figures(
    dense: MeasuredModel, model: MeasuredModel, base: MeasuredModel | None, directory: Path
) -> Row:
    """Return what a row says of a model beside the dense one and `ffn` alone."""
    found = compare(dense, model, dense)
    ratios = [math.exp(text["loss"]["difference"]["value"]) for text in found["texts"].values()]
    figures: Row = {
        "what goes": _in_words(PruningPlan.load(directory / PLAN_FILE)),
        "parameters": open_checkpoint(directory).parameter_count,
        "mean": round(geometric_mean(ratios), 3),
        "worst": round(max(ratios), 3),
        "KL": _rounded(_mean_of_texts(found, "divergence", "second")),
        "equal": round(100 * _mean_of_texts(found, "agreed", "second").value, 1),
    }
    if base is not None:
        beside = compare(base, model, dense)
        figures["KL - ffn"] = _rounded(_mean_of_texts(beside, "divergence", "difference"))
    if found["accuracy"] is not None:
        figures["tasks"] = _rounded(Number(**found["accuracy"]["difference"]), 100)
    return figures


def _mean_of_texts(found: dict[str, Any], measure: str, side: str) -> Number:
    pairs = [text[measure] for text in found["texts"].values() if text[measure] is not None]
    return mean_of_tasks([Number(**pair[side]) for pair in pairs])


def _rounded(found: Number, factor: float = 1) -> list[float | None]:
    error = None if found.stderr is None else round(factor * found.stderr, 3)
    return [round(factor * found.value, 3), error]


def _in_words(plan: PruningPlan) -> str:
    """Return what of each part goes; shares count what goes with blocks and attention layers."""
    words = [plan.removed_in_words] if plan.removed_blocks or plan.removed_attentions else []
    if "ffn" in plan.parts and plan.ffn_sparsity:
        words.append(f"{plan.ffn_sparsity:.1%} of all FFN channels")
    if "kv" in plan.parts and plan.sparsity_of("kv"):
        words.append(f"{plan.sparsity_of('kv'):.1%} of all KV groups")
    return ", ".join(words)


def _shown(rows: Sequence[Row], values: Sequence[str]) -> str:
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
    sys.exit(main())
