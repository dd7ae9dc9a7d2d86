"""Prune, quantise, or both: bytes, speed, perplexity and tasks of one model in llama.cpp.

    cfsp prune demo --sparsity 0.2 --set multiple=256 --out d0.2      # what K-quants work on
    python benchmarks/choose.py demo --pruned d0.2 --out DIR --data wikitext2 --data c4 \
        --tasks piqa arc_easy --task-data TASKS --limit 200

exports the dense model and pruned ones as F16, Q8_0 and Q4_K_M, and measures each file in the same
program: its size, CPU seconds of one thread for the prompt and for new tokens, the perplexity on
each text, how often its first choice of a token is that of the dense model in F16, and how it does
on multiple-choice tasks. Results are in DIR/choose.json, one entry a file, and a table and a
picture are made of them. What each file made of each document is in DIR/tasks.json, which
`cfsp compare DIR/tasks.json --against dense-f16` reads. A run that is stopped goes on where it
was; tasks that are asked for later are added.

Speeds are CPU time, not time on the clock, because one thread's CPU time hardly depends on what
other programs do. On a quiet machine, for several threads, use llama.cpp's own `llama-bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from markupsafe import Markup, escape

import cfsp
from cfsp.checkpoint.llama_cpp import LlamaCpp, llama_cpp_version
from cfsp.checkpoint.locating import locate_model
from cfsp.checkpoint.reading import Checkpoint
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import evaluation_windows
from cfsp.quality.results_file import measured_model
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.settings import EvaluationText, Workload
from cfsp.speed.subjects import random_prompt
from cfsp.text.tokenizers import load_tokenizer

TYPES = ("f16", "q8_0", "q4_k_m")
DENSE = "dense"
PROMPT = 128
NEW_TOKENS = 16
ROUNDS = 3


def main() -> None:
    """Measure what is not measured yet; write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as for prune")
    parser.add_argument("--out", required=True, type=Path, help="a directory for all results")
    parser.add_argument("--data", action="append", required=True, help="text to measure on")
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument(
        "--pruned", type=Path, action="append", default=[], help="a pruned directory"
    )
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--tasks", nargs="+", help="multiple-choice tasks, as for cfsp eval")
    parser.add_argument("--task-data", type=Path, help="a directory of JSONL files")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = None
    if args.tasks:
        selection = TaskSelection(tuple(args.tasks), args.limit, data=args.task_data)
        tasks = TaskRunner.of(selection)
    file = args.out / "choose.json"
    found = json.loads(file.read_text()) if file.is_file() else {"files": []}
    models = {DENSE: locate_model(args.model), **{path.name: path for path in args.pruned}}
    texts = _texts(args, models[DENSE])
    found["conditions"] = {
        "model": args.model,
        "texts": {name: len(windows) for name, windows in texts.items()},
        "seqlen": args.seqlen,
        "llama.cpp": llama_cpp_version(),
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
    }
    done = {(entry["model"], entry["weight_type"]): entry for entry in found["files"]}
    for name, directory in models.items():
        for weight_type in args.types:
            if (name, weight_type) not in done:
                entry = _measured(name, directory, weight_type, texts, args.out)
                done[name, weight_type] = entry
                found["files"].append(entry)
                file.write_text(json.dumps(found, indent=2) + "\n")
                print(entry, flush=True)
            if tasks is not None:
                entry = done[name, weight_type]
                gguf, _ = _exported(name, directory, weight_type, args.out)
                entry["tasks"] = _scored(tasks, gguf, directory, args.out / "tasks.json")
                file.write_text(json.dumps(found, indent=2) + "\n")
                print(name, weight_type, entry["tasks"], flush=True)
    print(table(found["files"]))
    (args.out / "choose.svg").write_text(picture(found["files"]))


def _texts(args: argparse.Namespace, dense: Path) -> dict[str, torch.Tensor]:
    """Return windows_NT of each text."""
    asked = EvaluationText(tuple(args.data), args.windows, args.seqlen)
    windows = evaluation_windows(asked, Checkpoint(dense))
    # A file is called by its folder, where that says more: wikitext2/test.parquet.
    return {(Path(name).parent.name or name): drawn.tokens_NT for name, drawn in windows.items()}


def _measured(
    name: str, directory: Path, weight_type: str, texts: dict[str, torch.Tensor], work: Path
) -> dict[str, Any]:
    file, notes = _exported(name, directory, weight_type, work)
    choices = work / "dense-choices.pt"
    perplexity, chosen = _read(file, texts)
    if name == DENSE and weight_type == "f16":
        torch.save(chosen, choices)
    prefill, decode = _speed(file)
    return {
        "model": name,
        "weight_type": weight_type,
        "nbytes": file.stat().st_size,
        "prefill": prefill,
        "decode": decode,
        "perplexity": perplexity,
        # The part of all tokens of all texts where the first choice is the dense one's.
        "same_choice": float((chosen == torch.load(choices)).float().mean()),
        "notes": notes,
    }


def _exported(
    name: str, directory: Path, weight_type: str, work: Path
) -> tuple[Path, tuple[str, ...]]:
    """Return the file, made if it is not there, and what the export said."""
    file = work / f"{name.replace(' ', '-')}-{weight_type}.gguf"
    if file.is_file():
        return file, ()
    # What the logits are compared with is text, not the checkpoint.
    result = cfsp.export(directory, "gguf", file, weight_type=weight_type, verify=False)
    return file, result.notes


def _scored(tasks: TaskRunner, file: Path, directory: Path, results: Path) -> dict[str, Any]:
    """Score one file on all tasks, unless it was, and compare it with the first file of all.

    `results` has what was scored so far, in the form of `cfsp eval --out`. Returned is `accuracy`,
    its `difference` to that of the first file in pairs, and how many of its answers are `kept`:
    each the mean over the tasks `counted`, on which the first file is better than a guess.
    """
    from llama_cpp_tasks import scorer

    asked = json.loads(json.dumps(tasks.identity()))
    found = json.loads(results.read_text()) if results.is_file() else {"asked": asked, "models": []}
    if found["asked"] != asked:
        raise SystemExit(f"{results} is of other tasks or another --limit; remove it to go on")
    models = {model["fingerprint"]: model for model in found["models"]}
    if file.name not in models:
        model = {"model": file.stem, "fingerprint": file.name, "windows": {}}
        model |= {"tasks": {}, "documents": {}}
        scores = scorer(tasks, file, load_tokenizer(directory))
        for name in tasks.selection.task_names:
            for part, value in scores(name).items():
                model[part] |= value
        models[file.name] = model
        found["models"].append(model)
        results.write_text(json.dumps(found) + "\n")
    first = measured_model(results.name, found["models"][0])
    pairs = compare(first, measured_model(results.name, models[file.name]), first)
    counted = [task for task, pair in pairs["tasks"].items() if pair["is_above_chance"]]
    if pairs["accuracy"] is None or pairs["kept"] is None:
        return {"counted": counted, "accuracy": None, "difference": None, "kept": None}
    return {
        "counted": counted,
        "accuracy": pairs["accuracy"]["second"],
        "difference": pairs["accuracy"]["difference"],
        "kept": pairs["kept"]["second"],
    }


def _read(file: Path, texts: dict[str, torch.Tensor]) -> tuple[dict[str, float], torch.Tensor]:
    """Return the perplexity on each text and the first choices after every token of all."""
    perplexity, chosen = {}, []
    for name, windows_NT in texts.items():
        losses = []
        with LlamaCpp(file, context=windows_NT.shape[1]) as model:
            for tokens_T in windows_NT:
                model.rewind()
                logits_TV = model.feed(tokens_T.tolist())
                chosen.append(logits_TV.argmax(dim=1))
                loss = torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:].long())
                losses.append(float(loss))
        perplexity[name] = math.exp(sum(losses) / len(losses))
    return perplexity, torch.cat(chosen)


def _speed(file: Path) -> tuple[float, float]:
    """Return prompt and new tokens for each CPU second of one thread, medians of rounds."""
    seconds = []
    with LlamaCpp(file, PROMPT + NEW_TOKENS + 2, threads=1, exact=False) as model:
        (prompt_P,) = random_prompt(model.vocabulary, Workload(1, PROMPT))
        for new_tokens in (1, 1 + NEW_TOKENS):
            found = []
            for _ in range(1 + ROUNDS):
                model.rewind()
                start = time.process_time()
                logits_1V = model.feed(prompt_P.tolist(), 1)
                for _ in range(new_tokens):
                    logits_1V = model.feed([int(logits_1V.argmax())], 1)
                found.append(time.process_time() - start)
            # The first run warms up.
            seconds.append(median(found[1:]))
    short, long = seconds
    return PROMPT / short, NEW_TOKENS / (long - short)


def table(files: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, as ratios to the dense model in F16."""
    first = files[0]
    texts = list(first["perplexity"])
    has_tasks = any("tasks" in entry for entry in files)
    head = ["model", "type", "MB", "size", "prefill", "decode", *texts, "same choice"]
    head += ["tasks", "to dense F16"] if has_tasks else []
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for entry in files:
        cells = [
            entry["model"],
            entry["weight_type"],
            f"{entry['nbytes'] / 1e6:.0f}",
            f"{entry['nbytes'] / first['nbytes']:.2f}",
            f"{entry['prefill'] / first['prefill']:.2f}x",
            f"{entry['decode'] / first['decode']:.2f}x",
            *(f"{entry['perplexity'][text]:.1f}" for text in texts),
            f"{entry['same_choice']:.0%}",
        ]
        cells += _task_cells(entry.get("tasks")) if has_tasks else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _task_cells(tasks: dict[str, Any] | None) -> list[str]:
    """Return the mean accuracy and the paired difference with its standard error, in percent."""
    if tasks is None or tasks["accuracy"] is None:
        return ["", ""]
    change = tasks["difference"]
    # A single document has no standard error.
    error = "" if change["stderr"] is None else f" ({100 * change['stderr']:.1f})"
    return [f"{100 * tasks['accuracy']['value']:.1f}", f"{100 * change['value']:+.1f}{error}"]


def element(tag: str, *children: str, **attributes: Any) -> Markup:
    """Return an element of SVG, whose children and attributes are escaped."""
    values = {name.replace("_", "-"): value for name, value in attributes.items()}
    written = "".join(f' {name}="{escape(value)}"' for name, value in values.items())
    return Markup(f"<{tag}{written}>{''.join(map(escape, children))}</{tag}>")


def picture(files: list[dict[str, Any]]) -> str:
    """Return size against perplexity as SVG: one line a model, one point a type."""
    width, height, left, right, top, bottom = 640, 400, 64, 150, 24, 48
    first = files[0]

    def loss_of(entry: dict[str, Any]) -> float:
        """Mean over texts of the perplexity over the dense one's, geometric."""
        return geometric_mean([v / first["perplexity"][k] for k, v in entry["perplexity"].items()])

    points = [(entry, entry["nbytes"] / 1e6, loss_of(entry)) for entry in files]
    most_x, most_y = max(x for _, x, _ in points) * 1.05, max(y for _, _, y in points)
    end, base = width - right, height - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        across = (end - left) * x / most_x
        up = (base - top) * math.log(y) / (math.log(most_y) * 1.1 + 0.01)
        return left + across, base - up

    parts: list[Markup] = []

    def say(text: str, x: float, y: float, **how: Any) -> None:
        parts.append(element("text", text, x=round(x), y=round(y), **how))

    def grid(x1: float, y1: float, x2: float, y2: float) -> None:
        parts.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="#e2e2e2"))

    def dot(x: float, y: float, colour: str) -> None:
        parts.append(element("circle", cx=x, cy=y, r=4, fill=colour))

    parts.append(element("title", "Size on disk against perplexity, dense and pruned, by type"))
    parts.append(element("rect", width=width, height=height, fill="#ffffff"))
    for tick in range(0, int(most_x) + 1, 50):
        x, y = at(tick, 1)
        say(str(tick), x, y + 18, text_anchor="middle")
        grid(x, top, x, y)
    for tick in (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0):
        if tick <= most_y * 1.05:
            x, y = at(0, tick)
            say(f"{tick:g}", x - 6, y + 4, text_anchor="end")
            grid(x, y, end, y)
    say("MB on disk", (left + end) / 2, height - 10, text_anchor="middle")
    say("perplexity / dense F16", left, 14)
    colours = ("#1b1b1b", "#2b6cb0", "#2f855a", "#c05621", "#b83280", "#6b46c1")
    names = dict.fromkeys(entry["model"] for entry in files)
    for number, (name, colour) in enumerate(zip(names, colours, strict=False), start=1):
        own = [
            (entry["weight_type"], *at(x, y)) for entry, x, y in points if entry["model"] == name
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in own)
        parts.append(element("polyline", points=line, fill="none", stroke=colour))
        for weight_type, x, y in own:
            dot(x, y, colour)
            say(weight_type.upper(), x + 6, y - 6, font_size=10)
        dot(end + 16, top + 18 * number - 4, colour)
        say(name, end + 26, top + 18 * number)
    box = f"0 0 {width} {height}"
    how = {"viewBox": box, "font_family": "sans-serif", "font_size": 12}
    return str(element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **how)) + "\n"


if __name__ == "__main__":
    main()
