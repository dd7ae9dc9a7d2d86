"""Measure the perplexity of models on texts, their scores on tasks, and their answers.

cfsp eval smaller --against MODEL --data wikitext2 --tasks piqa --answers --out a.json
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.cli import arguments
from cfsp.cli.options import Parser, add_advanced, settings_from
from cfsp.cli.output import Told, estimate, human_count, print_table
from cfsp.errors import UsageError
from cfsp.processes import process_count
from cfsp.settings import (
    BOS,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_QUESTIONS,
    Compute,
    EvaluationText,
)


def add_options_to(parser: Parser) -> None:
    """Add its options."""
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
    text.add_argument(
        "--windows",
        type=_windows,
        default=12,
        metavar="N",
        help="first N windows of each text, or all (default: 12)",
    )
    text.add_argument(
        "--seqlen",
        type=int,
        metavar="T",
        help="tokens in a window (default: 1024, or what the models can read if that is less)",
    )
    text.add_argument(
        "--bos", default="auto", choices=BOS, help="as `cfsp prune --help-all` says (default: auto)"
    )
    _add_tasks(parser)
    _add_answers(parser)
    arguments.add_compute(parser)


def _add_tasks(parser: Parser) -> None:
    tasks = parser.add_argument_group("tasks, scored by lm-evaluation-harness")
    tasks.add_argument(
        "--tasks",
        action="extend",
        type=arguments.names,
        metavar="A,B,...",
        help="names of the harness, such as piqa, lambada_openai, gsm8k; or cfsp-paper (HellaSwag, "
        "PIQA, WinoGrande, ARC-e, ARC-c, OpenBookQA, BoolQ, MMLU)",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="first N documents of each task")
    tasks.add_argument(
        "--shots", type=int, metavar="K", help="solved examples before each question (default: 0)"
    )
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="read DIR/piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl, openbook_qa.jsonl, "
        "boolq.jsonl, winogrande.jsonl, hellaswag.jsonl, mmlu.jsonl, lambada.jsonl instead of the "
        "hub",
    )


def _add_answers(parser: Parser) -> None:
    answers = parser.add_argument_group("answers in the chat template, beside the dense model's")
    answers.add_argument(
        "--answers",
        nargs="?",
        type=partial(_count, "questions, with the models before --answers"),
        const=DEFAULT_QUESTIONS,
        metavar="N",
        help=f"ask the first N of {DEFAULT_QUESTIONS} questions of ten kinds that come with cfsp "
        "(default: all)",
    )
    answers.add_argument(
        "--questions",
        metavar="CHATS",
        help="ask what the user says first in each chat of a .jsonl file instead",
    )
    add_advanced(
        parser,
        "--answer-tokens",
        type=int,
        default=DEFAULT_ANSWER_TOKENS,
        metavar="T",
        help=f"the most tokens of an answer (default: {DEFAULT_ANSWER_TOKENS})",
    )


def run(args: argparse.Namespace) -> Told:
    """Evaluate."""
    answers = "--answers" if args.answers else "--questions" if args.questions else None
    if not (args.data or args.tasks or answers):
        raise UsageError("expected --data, --tasks, --answers or several, found none")
    if args.answer_tokens != DEFAULT_ANSWER_TOKENS and not answers:
        raise UsageError("--answer-tokens is about answers; add --answers, or leave it out")
    alone = "--tasks" if args.tasks else answers
    if alone and process_count() > 1:
        raise UsageError(
            f"{alone} runs in one process, found {process_count()}; leave it out, or evaluate "
            "without torchrun"
        )
    from cfsp.text.sources import check_texts

    check_texts(evaluation=args.data)

    from cfsp.quality.tasks.selection import DEFAULT_BATCH, TaskSelection

    selection = None
    if args.tasks:
        batch = args.batch_windows or DEFAULT_BATCH
        selection = TaskSelection(tuple(args.tasks), args.limit, args.shots, args.task_data, batch)

    from cfsp.checkpoint.loading import compute_device
    from cfsp.processes import joined, take_own_accelerator
    from cfsp.quality.answers import Questions
    from cfsp.quality.evaluate import evaluate_models
    from cfsp.quality.tasks.harness import TaskRunner

    texts = EvaluationText(tuple(args.data or ()), args.windows, args.seqlen, args.bos)
    questions = None
    if answers:
        questions = Questions.of(
            args.answers or DEFAULT_QUESTIONS, args.questions, args.answer_tokens
        )
    runner = TaskRunner.of(selection) if selection else None
    compute = settings_from(args, Compute)
    take_own_accelerator(compute.device)
    with joined(compute_device(compute.device)) as team:
        models = evaluate_models(
            args.models,
            texts,
            compute,
            runner,
            questions=questions,
            against=args.against,
            out=args.out,
            team=team,
        )
    found: dict[str, Any] = {"models": models}
    if runner:
        found["tasks"] = runner.conditions()
    return (found, partial(_print, found, args)) if team.is_first else None


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a table of each thing that was measured."""
    if args.data:
        _print_perplexity(found["models"])
        _print_agreement(found["models"])
    if args.tasks:
        print("\n" * bool(args.data), end="")
        _print_tasks(found["models"], found["tasks"])
    if args.answers or args.questions:
        print("\n" * bool(args.data or args.tasks), end="")
        _print_answers(found["models"])
    if args.out is not None:
        print(f"\nall of it: {args.out}; pairs: cfsp compare {shlex.quote(str(args.out))}")


def _windows(text: str) -> int | None:
    """Return a number of windows; None for all."""
    return None if text == "all" else _count("windows from 1, or all", text)


def _count(what: str, text: str) -> int:
    """Return a positive number, or say of what it must be one."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a number of {what}, found {text!r}")
    return count


def _print_perplexity(results: list[dict[str, Any]]) -> None:
    """Print a row for each model and a column for each text, and under what they were measured."""
    texts, models = _short(results)
    rows = [
        (
            models[result["model"]],
            human_count(result["parameters"]),
            *(f"{value['value']:.2f}" for value in result["perplexity"].values()),
        )
        for result in results
    ]
    print_table(("perplexity", "parameters", *texts.values()), rows)
    print()
    for text, value in results[0]["perplexity"].items():
        print(
            f"{texts[text]}: {counted(value['windows'], 'windows')} of {value['seqlen']} "
            f"tokens, {value['tokens']:,} predicted; {_beginnings(results, text)}"
        )
    print(f"computed in {_dtypes(results)}")


def _print_agreement(results: list[dict[str, Any]]) -> None:
    """Print how far each model is from the dense one; nothing where there is none."""
    compared = [result for result in results if "agreement" in result]
    if not compared:
        return
    texts, models = _short(results)
    rows, sums = [], []
    for result in compared:
        found = result["agreement"]
        for text, each in found["texts"].items():
            rows.append(
                (
                    models[result["model"]],
                    texts[text],
                    f"{each['perplexity_ratio']:.3f}",
                    estimate(each["divergence"], 4),
                    estimate(each["agreed"], 2, 100),
                )
            )
        sums.append(
            f"{models[result['model']]}: perplexity {found['perplexity_ratio']:.3f} of dense in "
            f"the geometric mean, {found['worst']['perplexity_ratio']:.3f} on "
            f"{texts[found['worst']['text']]}"
        )
    print()
    head = ("model", "text", "perplexity / dense", "KL per token", "top-1 agreement, %")
    print_table(head, rows, left=2)
    print()
    for line in sums:
        print(line)
    against = compared[0]["agreement"]["against"]
    print(f"against {models.get(against, against)}; KL in nats; standard errors of windows")


def _print_answers(results: list[dict[str, Any]]) -> None:
    """Print a row for each model, the dense one first."""
    models = _short(results)[1]
    rows = []
    for number, result in enumerate(results):
        found = result["answers"]["summary"]
        apart = (estimate(found["divergence"], 3), estimate(found["agreed"], 1, 100))
        shares = (f"{100 * found[name]['value']:.0f}" for name in ("stops", "loops"))
        alike = f"{found['alike']['value']:.1f}"
        rows.append((models[result["model"]], *(apart if number else ("-", "-")), *shares, alike))
    dense = results[0]["answers"]
    asked = counted(len(dense["documents"]), "questions")
    head = ("KL per token", "top-1 agreement, %", "stop, %", "loop, %", "first tokens alike")
    print_table((f"answers to {asked}", *head), rows)
    print(
        f"\ngreedy, up to {dense['longest']} tokens; KL in nats and agreement on the answers of "
        f"{models[results[0]['model']]}, with standard errors\n"
        "of questions; stop: end their turn; loop: 4 tokens in a row come 4 times; alike: before "
        "the first other"
    )


def _beginnings(results: list[dict[str, Any]], text: str) -> str:
    """Return which models' windows begin with BOS."""
    models = _short(results)[1]
    begin = [models[each["model"]] for each in results if each["perplexity"][text]["bos"]]
    if 0 < len(begin) < len(results):
        return f"BOS first: {', '.join(begin)}"
    return "BOS first" if begin else "no BOS"


def _short(results: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what tables call each text, and each model."""
    from cfsp.result.names import short_names

    texts = (text for result in results for text in result.get("perplexity", {}))
    return short_names(texts), short_names(result["model"] for result in results)


def _dtypes(results: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(result["dtype"] for result in results))


def _print_tasks(results: list[dict[str, Any]], conditions: dict[str, Any]) -> None:
    """Print a row for each task and metric and a column for each model."""
    models, rows = _short(results)[1], []
    for task, scores in results[0]["tasks"].items():
        for metric in ("acc", "acc_norm", "exact_match", "loss"):
            if metric in scores:
                cells = [_score(result["tasks"][task], metric) for result in results]
                rows.append((task, metric, str(scores["documents"]), *cells))
    print_table(
        ("task", "metric", "documents", *(models[result["model"]] for result in results)), rows
    )
    versions = ", ".join(
        f"{task} {scores['version']} ({scores['shots']} shots)"
        for task, scores in results[0]["tasks"].items()
    )
    print(
        f"\npercent (loss: nats), with standard errors; {conditions['harness']}; {versions}; "
        f"data: {conditions['task_data']}; {_dtypes(results)}, batches of {conditions['batch']}"
    )


def _score(scores: dict[str, Any], metric: str) -> str:
    value = {"value": scores[metric], "stderr": scores[f"{metric}_stderr"]}
    return estimate(value, 3) if metric == "loss" else estimate(value, 1, 100)
