"""What a checkpoint is: family, blocks, widths, parameters, and how it was pruned."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.skeleton import PRUNED_KEY
from cfsp.checkpoint.text_config import text_config_of
from cfsp.result.conditions import perplexities
from cfsp.result.facts import what_went
from cfsp.result.making import making
from cfsp.result.manifest import facts_for_config, read_manifest, refusing_damage


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint; nothing but its headers is read."""
    units = checkpoint.architecture.of_part("ffn").units
    attentions = [unit.width for unit in checkpoint.architecture.stock_units if unit.part == "kv"]
    blocks = int(checkpoint.architecture.block_count)
    widths = [unit.width for unit in units]
    has_one_unit_each = [unit.block for unit in units] == list(range(blocks))
    manifest = read_manifest(checkpoint.directory)
    if manifest is None:  # it was pruned in memory and saved by transformers
        manifest = getattr(checkpoint.config, PRUNED_KEY, None)
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
        "parameters": parameter_count(checkpoint),
        "bytes": sum(spec.nbytes for spec in checkpoint.specs.values()),
        "dtype": dtypes.most_common(1)[0][0],
        "pruned": None,
    }
    if attentions:
        facts["kv_groups"] = attentions
    if checkpoint.quantisation is not None:
        facts["quantised"] = checkpoint.quantisation.method
    if not has_one_unit_each or len({unit.ffns for unit in units}) > 1:
        facts["units"] = [
            {"block": unit.block, "path": unit.path, "width": unit.width, "ffns": unit.ffns}
            for unit in units
        ]
    # Recovery also takes models that cfsp did not prune.
    if manifest is not None and (
        manifest.get("operation") != "recover" or "base_model" in manifest
    ):
        facts["pruned"] = pruned = facts_for_config(manifest)
        with refusing_damage(checkpoint.directory):
            _ = pruned["base_model"]["name"], what_went(pruned)
            _ = making(pruned), perplexities(pruned)
    return facts
