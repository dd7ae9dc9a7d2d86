"""The protocol that papers on pruning share, in one command, for whoever has the weights and a GPU.

    python benchmarks/protocol.py meta-llama/Llama-3.1-8B --out protocol
    python benchmarks/protocol.py demo --out protocol --local DIR --size small

Removes 25, 37.5 and 50% of the block parameters and 20 and 50% of the FFN channels, on 256 windows
of 2048 tokens of C4. Measures perplexity on WikiText-2-raw test and on C4 validation in
windows of 2048 tokens without BOS, with KL to the dense model and top-1 agreement; scores
PIQA, HellaSwag, WinoGrande, ARC-easy, ARC-challenge, BoolQ and OpenBookQA zero-shot, MMLU and GSM8K
with 5 examples, by lm-evaluation-harness. Prints Markdown, and writes it to OUT/table.md.

Every step is a `cfsp` command that is printed; what is finished is not done again, so that the
same command goes on after an interruption. The pruned models stay in OUT/models.

`--local DIR` reads DIR/wikitext2/test.parquet, DIR/c4/train.jsonl, DIR/c4/validation.jsonl and
DIR/tasks/*.jsonl instead of the hub; GSM8K is left out then. `--size small` measures 16 windows of
each text and the first 100 documents of each task, which a small model does on a CPU in an hour or
two; `--size quick` next to nothing, to see that it works.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cli import step
from cfsp.cli.output import estimate
from cfsp.quality.compare import compare
from cfsp.quality.results_file import MeasuredModel, read_models, read_results
from cfsp.result.tables import Table
from cfsp.streaming.runtime import versions

ZERO_SHOT = (
    *("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"),
)
FILES = {"openbookqa": "openbook_qa.jsonl"}
OF_BLOCKS = (0.25, 0.375, 0.5)
OF_CHANNELS = (0.2, 0.5)


@dataclass(frozen=True)
class Sizes:
    """How much of everything is used."""

    seqlen: int = 2048  # tokens in a window
    samples: int = 256  # windows of calibration
    c4_windows: str = "256"  # of its validation part
    wikitext_windows: str = "all"
    limit: int | None = None  # documents of each task


SIZES = {
    "full": Sizes(),
    "small": Sizes(samples=32, c4_windows="16", wikitext_windows="16", limit=100),
    "quick": Sizes(256, 8, "2", "2", 8),
}


@dataclass(frozen=True)
class Texts:
    """Where texts and tasks are."""

    calibration: str = "c4"
    wikitext: str = "wikitext2"
    c4: str = "c4"
    task_data: Path | None = None  # a directory; None for the harness's own data

    @classmethod
    def in_directory(cls, directory: Path) -> Texts:
        """Return the local ones."""
        return cls(
            str(directory / "c4/train.jsonl"),
            str(directory / "wikitext2/test.parquet"),
            str(directory / "c4/validation.jsonl"),
            directory / "tasks",
        )

    def has(self, task: str) -> bool:
        """Return whether a task can be scored."""
        if self.task_data is None:
            return True
        return (self.task_data / FILES.get(task, f"{task}.jsonl")).is_file()


@dataclass(frozen=True)
class Pruned:
    """A model of the protocol."""

    name: str  # of its directory
    title: str  # of its row
    arguments: tuple[str, ...]  # that say how much is removed


def pruned_models(
    source: Checkpoint, of_blocks: Sequence[float], of_channels: Sequence[float]
) -> Iterator[Pruned]:
    """Yield the models; of a share of block parameters all the others stay."""
    of_all = sum(parameters_of_blocks(source)) / source.parameter_count
    for share in of_blocks:
        yield Pruned(
            f"blocks-{100 * share:g}",
            f"{100 * share:g}% of block parameters",
            ("--target-params", f"{1 - share * of_all:.6f}", "--parts", "ffn"),
        )
    for share in of_channels:
        yield Pruned(
            f"channels-{100 * share:g}",
            f"{100 * share:g}% of FFN channels",
            ("--sparsity", f"{share:g}"),
        )


def prune_all(
    model: str, models: Sequence[Pruned], out: Path, texts: Texts, sizes: Sizes, more: Sequence[str]
) -> dict[str, Path]:
    """Prune; return the directory of each model by its name."""
    found = {}
    for each in models:
        directory = out / "models" / each.name
        if not (directory / MANIFEST_FILE).is_file():
            step(
                *("prune", model, *each.arguments, "--data", texts.calibration),
                *("--samples", sizes.samples, "--seqlen", sizes.seqlen, *more),
                *("--out", directory),
            )
        found[each.name] = directory
    return found


def measure_all(
    model: str, directories: Sequence[Path], out: Path, texts: Texts, sizes: Sizes
) -> list[Path]:
    """Measure; return the files of results. A file that is there is not measured again."""
    files = []
    for name, text, windows in (
        ("wikitext2", texts.wikitext, sizes.wikitext_windows),
        ("c4", texts.c4, sizes.c4_windows),
    ):
        files.append(out / f"{name}.json")
        step(
            *("eval", *directories, "--against", model, "--data", text, "--windows", windows),
            *("--seqlen", sizes.seqlen, "--bos", "no", "--out", files[-1]),
        )
    limit = () if sizes.limit is None else ("--limit", sizes.limit)
    data = () if texts.task_data is None else ("--task-data", texts.task_data)
    for name, tasks, shots in (
        ("zero-shot", ZERO_SHOT, 0),
        ("mmlu", ("mmlu",), 5),
        ("gsm8k", ("gsm8k",), 5),
    ):
        if known := [task for task in tasks if texts.has(task)]:
            files.append(out / f"{name}.json")
            step(
                *("eval", model, *directories, "--tasks", ",".join(known), "--shots", shots),
                *(*limit, *data, "--out", files[-1]),
            )
    return files


def table(
    model: str, titles: dict[str, str], files: Sequence[Path], out: Path, command: str
) -> str:
    """Return the rows as Markdown, for the dense model and `titles` of the pruned ones by name."""
    measured = {each.name: each for each in read_models(files)}
    results: dict[str, dict[str, Any]] = {}
    for path in files:
        for each in read_results(path)["models"]:
            known = results.setdefault(each["model"], {"perplexity": {}, **each})
            known["perplexity"] = known["perplexity"] | each["perplexity"]
    dense = measured[model]
    texts = list(results[model]["perplexity"])
    tasks = {task: _metrics(dense, task) for task in dense.tasks}
    head = ["model", "parameters", *(f"{text}, perplexity, KL" for text in _short(texts))]
    head += [f"{task} {'/'.join(metrics)}" for task, metrics in tasks.items()]
    head += ["tasks - dense", "answers kept"]
    rows = []
    for name, title in {model: "dense", **titles}.items():
        each = measured[name if name == model else str(out / "models" / name)]
        result = results[each.name]
        found = compare(dense, each, dense)
        row = [title, f"{result['parameters']:,}"]
        for text, pairs in found["texts"].items():
            far = pairs["divergence"]
            divergence = "" if far is None else f", {far['second']['value']:.3f}"
            row.append(f"{result['perplexity'][text]['value']:.2f}{divergence}")
        for task, metrics in tasks.items():
            scores = each.tasks[task]
            row.append("/".join(f"{100 * scores[metric]:.1f}" for metric in metrics))
        row += [_percent(found["accuracy"], "difference"), _percent(found["kept"], "second")]
        rows.append(row)
    left_out = compare(dense, dense, dense)["left_out"]
    notes = [
        "Perplexity without BOS. Tasks in percent. Tasks - dense and answers kept: paired, mean of "
        "the tasks"
        + (f" but {', '.join(left_out)}, which the dense model guesses" if left_out else ""),
        f"`{command}`",
        f"{_commit()}; " + ", ".join(f"{name} {each}" for name, each in versions().items()),
        "Rows of other methods are not here: take them from their papers, where their conditions "
        "stand, too.",
    ]
    return Table(head, rows).to_markdown() + "\n" + "\n\n".join(notes) + "\n"


def _metrics(model: MeasuredModel, task: str) -> list[str]:
    return [name for name in ("acc", "acc_norm", "exact_match") if name in model.tasks[task]]


def _short(texts: Sequence[str]) -> list[str]:
    return ["/".join(Path(text).parts[-2:]) for text in texts]


def _percent(pair: Any, side: str) -> str:
    return "-" if pair is None else estimate(pair[side], 1, 100)


def _commit() -> str:
    """Return which state of the code this is."""
    directory = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(directory), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no commit known"


def main(argv: Sequence[str] | None = None) -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="as for cfsp prune")
    parser.add_argument("--out", type=Path, required=True, help="directory for models and results")
    parser.add_argument("--local", type=Path, metavar="DIR", help="read local texts and tasks")
    parser.add_argument("--size", choices=SIZES, default="full", help="how much of everything")
    parser.add_argument("--of-blocks", type=float, nargs="*", default=OF_BLOCKS, metavar="P")
    parser.add_argument("--of-channels", type=float, nargs="*", default=OF_CHANNELS, metavar="P")
    parser.add_argument(
        "--prune", default="", metavar="ARGS", help="more arguments of cfsp prune, in one string"
    )
    args = parser.parse_args(argv)
    sizes = SIZES[args.size]
    texts = Texts() if args.local is None else Texts.in_directory(args.local)
    models = list(pruned_models(open_checkpoint(args.model), args.of_blocks, args.of_channels))
    more = shlex.split(args.prune)
    directories = prune_all(args.model, models, args.out, texts, sizes, more)
    files = measure_all(args.model, list(directories.values()), args.out, texts, sizes)
    titles = {each.name: each.title for each in models}
    typed = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/protocol.py", *typed])
    shown = table(args.model, titles, files, args.out, command)
    (args.out / "table.md").write_text(shown, encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
