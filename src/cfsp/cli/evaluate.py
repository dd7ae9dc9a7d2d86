"""`cfsp eval`: perplexity of several models on several texts, in one table."""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.output import human_count, print_json, print_table


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "eval",
        "measure the perplexity of models on texts",
        "cfsp eval MODEL smaller --data wikitext2 --data c4 --windows 12",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for prune")
    parser.add_argument(
        "--data", action="append", required=True, metavar="TEXT", help="as for prune; repeatable"
    )
    parser.add_argument(
        "--windows", type=int, metavar="N", help="first N windows of each text (default: all)"
    )
    parser.add_argument(
        "--seqlen", type=int, default=1024, metavar="T", help="tokens in a window (default: 1024)"
    )
    arguments.add_compute(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    from cfsp.pipeline import evaluate_models

    texts = arguments.evaluation_text(args.data, args.windows, args.seqlen)
    results = evaluate_models(args.models, texts, arguments.compute(args))
    if args.json:
        print_json({"models": results})
        return
    rows = [
        (
            result["model"],
            human_count(result["parameters"]),
            *(f"{value:.2f}" for value in result["perplexity"].values()),
        )
        for result in results
    ]
    print_table(("perplexity", "parameters", *args.data), rows)
    counts = ", ".join(f"{count:,} of {text}" for text, count in results[0]["tokens"].items())
    print(f"\npredicted tokens: {counts}; windows of {args.seqlen}; {results[0]['dtype']}")
