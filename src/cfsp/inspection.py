"""What a checkpoint is: family, blocks, widths, parameters, and how it was pruned."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.families import intermediate_sizes
from cfsp.manifest import read_manifest

_FROM_MANIFEST = (
    "operation",
    "base_model",
    "criterion",
    "calibration",
    "ffn_sparsity",
    "model_sparsity",
    "parameters_before",
    "perplexity",
    "command",
    "created",
    "versions",
)


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint; nothing but its headers is read."""
    widths = intermediate_sizes(checkpoint.config)
    manifest = read_manifest(checkpoint.directory)
    dtypes = Counter(str(s.dtype).removeprefix("torch.") for s in checkpoint.specs.values())
    facts: dict[str, Any] = {
        "model": checkpoint.label,
        "directory": str(checkpoint.directory),
        "family": checkpoint.family.model_type,
        "blocks": checkpoint.config.num_hidden_layers,
        "hidden_size": checkpoint.config.hidden_size,
        "experts": checkpoint.family.ffn_count(checkpoint.config),
        "intermediate_sizes": widths,
        "uniform": len(set(widths)) == 1,
        "parameters": parameter_count(checkpoint),
        "bytes": sum(spec.nbytes for spec in checkpoint.specs.values()),
        "dtype": dtypes.most_common(1)[0][0],
        "pruned": None,
    }
    if manifest is not None:
        facts["pruned"] = {key: manifest[key] for key in _FROM_MANIFEST if key in manifest}
    return facts
