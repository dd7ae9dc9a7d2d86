"""What a checkpoint is: family, blocks, widths, parameters, and how it was pruned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from cfsp.checkpoint.config_widths import PRUNED_KEY
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import CheckpointError
from cfsp.result.manifest import read_manifest

_FROM_MANIFEST = (
    "operation",
    "base_model",
    "criterion",
    "calibration",
    "removed_blocks",
    "removed_attentions",
    "ffn_sparsity",
    "kv_groups",
    "experts",
    "model_sparsity",
    "parameters_before",
    "repair",
    "recovery",
    "perplexity",
    "command",
    "created",
    "versions",
)

_SHOWN = {
    "base_model": ("name",),
    "criterion": ("block_metric", "channel_metric", "multiple"),
    "calibration": ("sources", "seqlen"),
}


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint; nothing but its headers is read."""
    units = checkpoint.architecture.of_part("ffn").units
    stock_units = checkpoint.architecture.stock_units
    attentions = [unit for unit in stock_units if unit.part == "kv"]
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
        facts["kv_groups"] = [unit.width for unit in attentions]
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
        _check(manifest, checkpoint.directory)
        facts["pruned"] = {key: manifest[key] for key in _FROM_MANIFEST if key in manifest}
    return facts


def _check(manifest: dict[str, Any], directory: Path) -> None:
    """Check that the manifest holds what is shown of it.

    Raises:
        CheckpointError: it does not.
    """
    try:
        float(manifest["ffn_sparsity"]), float(manifest["model_sparsity"])
        for table, keys in _SHOWN.items():
            for key in keys:
                _ = manifest[table][key]
        for value in manifest["perplexity"].values():
            float(value["before"]), float(value["after"])
        dict(manifest["calibration"]["sources"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST_FILE} is damaged ({error!r}); prune the model again"
        ) from error
