"""`cfsp inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from cfsp.architecture.block_names import blocks_in_words, counted, removed_in_words
from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, human_count, print_json
from cfsp.settings import block_metric_in_words


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

    checkpoint = open_checkpoint(args.model, args.revision)
    # It imports torch, which a wrong name does not wait for.
    from cfsp.result.inspect import inspect_checkpoint

    facts = inspect_checkpoint(checkpoint)
    if args.json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from cfsp.planning.experts import SCORE_IN_WORDS
    from cfsp.result.conditions import sources_in_words
    from cfsp.result.repair_steps import repair_steps, steps_in_words

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
    print(f"pruned             {_what_went(facts)}, from {pruned['base_model']['name']}")
    criterion, calibration = pruned["criterion"], pruned["calibration"]
    if "removal" in criterion:
        print(f"removed by         {criterion['removal']}")
    if "experts" in pruned:
        print(f"experts by         {SCORE_IN_WORDS}")
    print(
        f"criterion          blocks by {block_metric_in_words(criterion['block_metric'])}, "
        f"channels by {criterion['channel_metric']}, multiples of {criterion['multiple']}"
    )
    texts = sources_in_words(calibration["sources"])
    print(f"calibration        {texts} of {calibration['seqlen']} tokens")
    print(f"repair             {steps_in_words(repair_steps(pruned))}")
    _print_perplexity(pruned["perplexity"])
    if "recovery" in pruned:
        print(f"recovery           {counted(pruned['recovery']['steps'], 'steps')} of training")
        _print_perplexity(pruned["recovery"].get("perplexity", {}))
    print(f"command            {pruned['command']}")


def _print_perplexity(of_texts: dict[str, Any]) -> None:
    from cfsp.result.conditions import Conditions

    for text, value in of_texts.items():
        change = f"{value['before']:.2f} -> {value['after']:.2f}"
        print(f"perplexity         {text}: {change} ({Conditions.of(text, value)})")


def _what_went(facts: dict[str, Any]) -> str:
    """Return what went of each part that lost something, and of all parameters."""
    pruned = facts["pruned"]
    removed = removed_in_words(
        *(pruned.get(key, ()) for key in ("removed_blocks", "removed_attentions"))
    )
    shares = {
        f"FFN {_nouns_of_share(facts)}": pruned["ffn_sparsity"],
        "KV groups": pruned.get("kv_groups", {}).get("sparsity", 0.0),
    }
    went = [f"{share:.1%} of {nouns}" for nouns, share in shares.items() if share]
    if experts := pruned.get("experts"):
        before, after = experts["before"][0], experts["after"][0]
        went.append(f"{before - after} of {before} experts of each block")
    in_all = ", ".join([*went, f"{pruned['model_sparsity']:.1%} of parameters"])
    return f"{removed}, in all {in_all}" if removed else in_all


def _nouns_of_share(facts: dict[str, Any]) -> str:
    """Return what the share that went is of: channels of several kinds own unlike numbers."""
    if "experts" in facts["pruned"]:
        return "parameters"
    kinds = {(unit["path"], unit["ffns"]) for unit in facts.get("units", ())}
    return "parameters" if len(kinds) > 1 else "channels"


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
