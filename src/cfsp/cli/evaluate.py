"""Measure the perplexity of models on texts, their scores on tasks, and their answers.

cfsp eval smaller --against MODEL --data wikitext2 --tasks piqa --answers --out a.json
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.cli.options import Parser, add_compute, add_options, kind_of, settings_from, typed
from cfsp.cli.output import Told, estimate, print_table
from cfsp.errors import UsageError
from cfsp.processes import check_is_alone, joined, take_own_accelerator
from cfsp.quality.tasks.selection import DEFAULT_BATCH, TaskSelection
from cfsp.settings import DEFAULT_QUESTIONS, Compute, EvaluationText, from_names, names_in
from cfsp.text.sources import check_texts

# What says how to measure something, by the option that asks for it.
_ABOUT = {"data": ("windows", "seqlen", "bos"), "tasks": ("limit", "shots", "task_data")}


def add_options_to(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for prune")
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="measure the dense model too, and how far the others are from its predictions",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write all to a JSON file, window by window and document by document, for `cfsp "
        "compare`; an interrupted run goes on",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data", action="append", metavar="TEXT", help="as for prune; repeatable")
    fields = ("windows", "seqlen", "bos")
    add_options(parser, text, EvaluationText, fields=fields, hides=False)
    _add_tasks(parser)
    add_answers(parser.add_argument_group("answers in the chat template, beside the dense model's"))
    add_compute(parser)


def add_answers(group: Any) -> None:
    """Add the questions that models are asked to a group of a parser."""
    group.add_argument(
        "--answers",
        nargs="?",
        type=_asked,
        const=DEFAULT_QUESTIONS,
        metavar="N|CHATS",
        help=f"ask the first N of {DEFAULT_QUESTIONS} questions of ten kinds that come with cfsp "
        "(default: all), or each chat of a .jsonl file up to what its user says first",
    )


def _add_tasks(parser: Parser) -> None:
    tasks = parser.add_argument_group("tasks, scored by lm-evaluation-harness")
    tasks.add_argument(
        "--tasks",
        action="extend",
        type=kind_of(names_in),
        metavar="A,B,...",
        help="names of the harness, such as piqa, lambada_openai, gsm8k; or cfsp-paper (HellaSwag, "
        "PIQA, WinoGrande, ARC-e, ARC-c, OpenBookQA, BoolQ, MMLU)",
    )
    add_options(parser, tasks, TaskSelection, fields=("limit", "shots"))
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="read DIR/piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl, openbook_qa.jsonl, "
        "boolq.jsonl, winogrande.jsonl, hellaswag.jsonl, mmlu.jsonl, lambada.jsonl instead of the "
        "hub",
    )


def run(args: argparse.Namespace) -> Told:
    if not (args.data or args.tasks or args.answers):
        raise UsageError("expected --data, --tasks, --answers or several, found none")
    for owner, names in _ABOUT.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, owner):
                raise UsageError(f"--{name.replace('_', '-')} is about --{owner}; add --{owner}")
    if args.tasks or args.answers:
        alone = "--tasks" if args.tasks else "--answers"
        check_is_alone(alone, "leave it out, or evaluate without torchrun")
    check_texts(evaluation=args.data)
    selection = None
    if args.tasks:
        batch = args.batch_windows or DEFAULT_BATCH
        selection = TaskSelection(tuple(args.tasks), args.limit, args.shots, args.task_data, batch)

    from cfsp.checkpoint.loading import compute_device
    from cfsp.quality.answers import Questions
    from cfsp.quality.evaluate import Exam, evaluate_models
    from cfsp.quality.results_file import refusing_damage
    from cfsp.quality.tasks.harness import TaskRunner

    texts = from_names(EvaluationText, typed(args), names=args.data or ())
    questions = Questions.of(args.answers) if args.answers else None
    runner = TaskRunner.of(selection) if selection else None
    compute = settings_from(args, Compute)
    take_own_accelerator(compute.device)
    with joined(compute_device(compute.device)) as team:
        models = evaluate_models(
            list(dict.fromkeys(args.models)),
            Exam(texts, compute, runner, questions),
            against=args.against,
            out=args.out,
            team=team,
        )
    found: dict[str, Any] = {"models": models}
    if runner:
        found["tasks"] = runner.conditions()

    def say() -> None:
        # What was measured before was read from there.
        with nullcontext() if args.out is None else refusing_damage([args.out]):
            _print(found, args)

    return (found, say) if team.is_first else None


def _asked(text: str) -> int | str:
    if text.lower().endswith((".jsonl", ".parquet", ":messages")):
        return text
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            "expected a number of questions or a .jsonl file, with the models before --answers, "
            f"found {text!r}"
        )
    return int(text)


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a row for each fact and a column for each model, and under what it was measured."""
    from cfsp.result.names import short_names
    from cfsp.result.runs import measured_runs, sections

    models = found["models"]
    compares = args.against is not None and len(models) > 1
    names = short_names(model["model"] for model in models)
    runs = measured_runs(models, compares=compares)
    by_heading = sections(runs)
    rows = [row for of_heading in by_heading.values() for row in of_heading]
    print_table(
        ("", *names.values()),
        [
            (row.name, *(f"{cell.value} {cell.note}".strip() for cell in row.cells[not compares :]))
            for row in rows
        ],
    )
    print()
    for heading, of_heading in by_heading.items():
        # What most of them have is said once.
        (usual, _), *_ = Counter((row.detail, row.hint) for row in of_heading).most_common()
        others = dict.fromkeys((row.name, (row.detail, row.hint)) for row in of_heading)
        for name, how in [(heading, usual), *others]:
            if how[0] and (name == heading or how != usual):
                print(f"{name}: {', '.join(filter(None, how))}")
    for model in models:
        if args.data and "agreement" in model:
            ratio, worst = model["agreement"]["perplexity_ratio"], model["agreement"]["worst"]
            print(
                f"{names[model['model']]}: perplexity ratio {ratio:.3f} in the geometric mean, "
                f"{worst['perplexity_ratio']:.3f} on {short_names(args.data)[worst['text']]}"
            )
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in models))
    against = f"against {names[models[0]['model']]}; " if compares else ""
    errors = "; standard errors of windows, documents and questions"
    print(f"{against}computed in {dtypes}{errors if compares or args.tasks else ''}")
    if args.answers:
        asked = models[0]["answers"]
        print(f"answers: greedy, up to {asked['longest']} tokens")
        if not compares:  # the dense model alone, of which the table has none
            ends, loops = (estimate(asked["summary"][x], 1, 100) for x in ("stops", "loops"))
            print(f"answers that end: {ends}%; that repeat 4 tokens 4 times: {loops}%")
    if conditions := found.get("tasks"):
        versions = ", ".join(
            f"{task} {scores['version']} ({counted(scores['shots'] or 0, 'shots')})"
            for task, scores in models[0]["tasks"].items()
        )
        print(
            f"tasks: {conditions['harness']}; {versions}; data: {conditions['task_data']}; "
            f"batches of {conditions['batch']}"
        )
    if args.out is not None:
        print(f"\nall of it: {args.out}; pairs: cfsp compare {shlex.quote(str(args.out))}")
