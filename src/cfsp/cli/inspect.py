"""Show what a checkpoint is and how it was pruned.

cfsp inspect smaller
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.architecture.block_names import blocks_in_words
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.cli.options import Parser, add_model
from cfsp.cli.output import Told, human_bytes, human_count

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import Checkpoint


def add_options_to(parser: Parser) -> None:
    add_model(parser)


def run(args: argparse.Namespace) -> Told:
    checkpoint = open_checkpoint(args.model)

    from cfsp.result.manifest import refusing_damage

    facts = inspect_checkpoint(checkpoint)
    with refusing_damage(checkpoint.directory):
        lines = list(_lines(facts))

    def say() -> None:
        print(f"{facts['model']}: {facts['family']}, {facts['blocks']} blocks, {facts['dtype']}")
        for name, value in lines:
            print(f"{name:<18} {value}")

    return facts, say


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint; hardly more than its headers is read."""
    from cfsp.checkpoint.text_config import text_config_of
    from cfsp.result.facts import was_pruned
    from cfsp.result.manifest import facts_about, facts_for_config

    units = checkpoint.architecture.of_part("ffn").units
    groups = [unit.width for unit in checkpoint.architecture.of_part("kv").stock_units]
    blocks = int(checkpoint.architecture.block_count)
    widths = [unit.width for unit in units]
    has_one_unit_each = [unit.block for unit in units] == list(range(blocks))
    manifest = facts_about(checkpoint)
    dtypes = Counter(str(s.dtype).removeprefix("torch.") for s in checkpoint.specs.values())
    facts: dict[str, Any] = {
        "model": checkpoint.label,
        "directory": str(checkpoint.directory),
        "family": checkpoint.config.model_type,
        "blocks": blocks,
        "hidden_size": text_config_of(checkpoint.config).hidden_size,
        "experts": max(unit.ffns for unit in units),
        "intermediate_sizes": widths,
        "uniform": len(set(widths)) == 1,
        "parameters": checkpoint.parameter_count,
        "weight_bytes": checkpoint.nbytes,
        "dtype": dtypes.most_common(1)[0][0],
        "pruned": None,
    }
    if groups:
        facts["kv_groups"] = groups
    if checkpoint.quantisation is not None:
        facts["quantised"] = checkpoint.quantisation.method
    if not has_one_unit_each or len({unit.ffns for unit in units}) > 1:
        facts["units"] = [
            {"block": unit.block, "path": unit.path, "width": unit.width, "ffns": unit.ffns}
            for unit in units
        ]
    # Recovery also takes models that cfsp did not prune.
    if manifest:
        facts["pruned" if was_pruned(manifest) else "recovered"] = facts_for_config(manifest)
    return facts


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, object]]:
    from cfsp.result.facts import perplexities, what_went
    from cfsp.result.making import making

    yield "hidden size", facts["hidden_size"]
    yield from _widths(facts)
    if "kv_groups" in facts:
        yield "KV groups", _range(facts["kv_groups"])
    yield "parameters", f"{human_count(facts['parameters'])} ({facts['parameters']:,})"
    yield "size", human_bytes(facts["weight_bytes"])
    if "quantised" in facts:
        yield "stored", f"as {facts['quantised']}; type and size are those dequantised"
    pruned = facts["pruned"]
    if pruned is None:
        yield "pruned", "not by cfsp"
    else:
        kinds = {(unit["path"], unit["ffns"]) for unit in facts.get("units", ())}
        went = what_went(pruned, by_channels=len(kinds) < 2)
        yield "pruned", f"{went}, from {pruned['base_model']['name']}"
    made = pruned or facts.get("recovered", {})
    for conditions, of_models in perplexities(made).items():
        values = ", ".join(f"{value:.2f} {name}" for name, value in of_models.items())
        yield "perplexity", f"{conditions.text}: {values} ({conditions})"
    for stage in making(made):
        yield f"{stage.verb} by", stage.command
        yield from stage.facts.items()


def _widths(facts: dict[str, Any]) -> Iterator[tuple[str, object]]:
    name = "intermediate size"
    if "units" not in facts:
        yield name, _range(facts["intermediate_sizes"])
        if facts["experts"] > 1:
            yield "experts", f"{facts['experts']} in every block"
        return
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for unit in facts["units"]:
        kinds.setdefault((unit["path"], unit["ffns"]), []).append(unit)
    for (path, ffns), units in kinds.items():
        experts = f" ({ffns} experts)" if ffns > 1 else ""
        widths = _range([unit["width"] for unit in units])
        blocks = blocks_in_words([unit["block"] for unit in units])
        yield name, f"{path or 'FFN'}{experts} in {blocks}: {widths}"
        name = ""
    without = set(range(facts["blocks"])) - {unit["block"] for unit in facts["units"]}
    if without:
        yield name, f"no FFN in {blocks_in_words(sorted(without))}"


def _range(widths: Sequence[int]) -> str:
    """Return widths in words: `1536`, or `64 to 96: [64, 96, 80]`."""
    if len(set(widths)) == 1:
        return str(widths[0])
    return f"{min(widths)} to {max(widths)}: {list(widths)}"
