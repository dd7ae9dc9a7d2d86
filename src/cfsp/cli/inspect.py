"""`cfsp inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from cfsp.architecture.block_names import blocks_in_words
from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "inspect",
        "show what a checkpoint is and how it was pruned",
        "cfsp inspect smaller",
    )
    arguments.add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Inspect and print."""
    from cfsp.checkpoint.locating import open_checkpoint

    checkpoint = open_checkpoint(args.model)
    # It imports torch, which a wrong name does not wait for.
    from cfsp.result.inspect import inspect_checkpoint

    facts = inspect_checkpoint(checkpoint)
    if args.json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from cfsp.result.conditions import perplexities
    from cfsp.result.facts import what_went
    from cfsp.result.making import making

    print(f"{facts['model']}: {facts['family']}, {facts['blocks']} blocks, {facts['dtype']}")
    print(f"hidden size        {facts['hidden_size']}")
    _print_widths(facts)
    if "kv_groups" in facts:
        print(f"KV groups          {_range(facts['kv_groups'])}")
    print(f"parameters         {human_count(facts['parameters'])} ({facts['parameters']:,})")
    print(f"size               {human_bytes(facts['bytes'])}")
    if "quantised" in facts:
        print(f"stored             as {facts['quantised']}; type and size are those dequantised")
    pruned = facts["pruned"]
    if pruned is None:
        print("pruned             not by cfsp")
        return
    kinds = {(unit["path"], unit["ffns"]) for unit in facts.get("units", ())}
    went = what_went(pruned, by_channels=len(kinds) < 2)
    print(f"pruned             {went}, from {pruned['base_model']['name']}")
    for conditions, of_models in perplexities(pruned).items():
        values = ", ".join(f"{value:.2f} {name}" for name, value in of_models.items())
        print(f"perplexity         {conditions.text}: {values} ({conditions})")
    for stage in making(pruned):
        print(f"{stage.verb + ' by':<18} {stage.command}")
        for name, value in stage.facts.items():
            print(f"{name:<18} {value}")


def _print_widths(facts: dict[str, Any]) -> None:
    if "units" not in facts:
        print(f"intermediate size  {_range(facts['intermediate_sizes'])}")
        if facts["experts"] > 1:
            print(f"experts            {facts['experts']} in every block")
        return
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for unit in facts["units"]:
        kinds.setdefault((unit["path"], unit["ffns"]), []).append(unit)
    lines = []
    for (path, ffns), units in kinds.items():
        experts = f" ({ffns} experts)" if ffns > 1 else ""
        widths = _range([unit["width"] for unit in units])
        blocks = blocks_in_words([unit["block"] for unit in units])
        lines.append(f"{path or 'FFN'}{experts} in {blocks}: {widths}")
    without = set(range(facts["blocks"])) - {unit["block"] for unit in facts["units"]}
    if without:
        lines.append(f"no FFN in {blocks_in_words(sorted(without))}")
    for name, line in zip_longest(("intermediate size",), lines, fillvalue=""):
        print(f"{name:<18} {line}")


def _range(widths: Sequence[int]) -> str:
    """Return widths in words: `1536`, or `64 to 96: [64, 96, 80]`."""
    if len(set(widths)) == 1:
        return str(widths[0])
    return f"{min(widths)} to {max(widths)}: {list(widths)}"
