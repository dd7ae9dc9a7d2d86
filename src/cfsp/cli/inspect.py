"""`cfsp inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "inspect",
        "show what a checkpoint is and how it was pruned",
        "cfsp inspect smaller",
    )
    arguments.add_model(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Inspect and print."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.result.conditions import Conditions
    from cfsp.result.inspect import inspect_checkpoint
    from cfsp.result.repair_steps import repair_steps, steps_in_words

    facts = inspect_checkpoint(open_checkpoint(args.model, args.revision))
    if args.json:
        print_json(facts)
        return
    widths = facts["intermediate_sizes"]
    shape = str(widths[0]) if facts["uniform"] else f"{min(widths)} to {max(widths)}: {widths}"
    print(f"{facts['model']}: {facts['family']}, {facts['blocks']} blocks, {facts['dtype']}")
    print(f"hidden size        {facts['hidden_size']}")
    print(f"intermediate size  {shape}")
    if facts["experts"] > 1:
        print(f"experts            {facts['experts']} in every block")
    print(f"parameters         {human_count(facts['parameters'])} ({facts['parameters']:,})")
    print(f"size               {human_bytes(facts['bytes'])}")
    pruned = facts["pruned"]
    if pruned is None:
        print("pruned             not by cfsp")
        return
    print(
        f"pruned             {pruned['ffn_sparsity']:.1%} of FFN channels, "
        f"{pruned['model_sparsity']:.1%} of parameters, from {pruned['base_model']['name']}"
    )
    criterion, calibration = pruned["criterion"], pruned["calibration"]
    print(
        f"criterion          blocks by {criterion['block_metric']}, "
        f"channels by {criterion['channel_metric']}, multiples of {criterion['multiple']}"
    )
    texts = ", ".join(f"{name} ({count})" for name, count in calibration["sources"].items())
    print(f"calibration        {texts} windows of {calibration['seqlen']}")
    print(f"repair             {steps_in_words(repair_steps(pruned))}")
    for text, value in pruned["perplexity"].items():
        change = f"{value['before']:.2f} -> {value['after']:.2f}"
        print(f"perplexity         {text}: {change} ({Conditions.of(text, value)})")
    if "recovery" in pruned:
        print(f"recovery           {pruned['recovery']['steps']:,} steps of training")
        for text, value in pruned["recovery"].get("perplexity", {}).items():
            change = f"{value['before']:.2f} -> {value['after']:.2f}"
            print(f"perplexity         {text}: {change} ({Conditions.of(text, value)})")
    print(f"command            {pruned['command']}")
