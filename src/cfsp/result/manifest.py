"""The manifest `cfsp.json` of a checkpoint: what made it, from what, and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import CheckpointError, refusing_bad_json
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.names import public_command, public_name

MANIFEST_VERSION = 2


def removed_facts(plan: PruningPlan) -> dict[str, list[int]]:
    """Return which blocks and attentions go whole, as JSON types; of each part only if some do."""
    keys = ("removed_blocks", "removed_attentions")
    return {key: list(getattr(plan, key)) for key in keys if getattr(plan, key)}


# What `cfsp inspect` tells, and what a model that was pruned in memory says of it in its config.
_IN_CONFIG = (
    "operation", "base_model", "criterion", "calibration", "removed_blocks", "removed_attentions",
    "ffn_sparsity", "kv_groups", "experts", "model_sparsity", "parameters_before", "repair",
    "recovery", "pruned", "perplexity", "command", "created", "versions",
)  # fmt: skip


def facts_for_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a manifest that travels in the config of a model in memory."""
    return {key: manifest[key] for key in _IN_CONFIG if key in manifest}


def digest_of_plan(plan: PruningPlan) -> str:
    """Return what a manifest has of the plan beside it."""
    return sha256(plan.to_json().encode()).hexdigest()


def published(value: Any) -> Any:
    """Return JSON in which no command and no place has a path of the machine."""
    if not isinstance(value, dict):
        return value
    public = {"command": public_command, "out": public_name}
    return {
        key: public[key](each) if key in public and isinstance(each, str) else published(each)
        for key, each in value.items()
    }


def write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    """Write the manifest into a checkpoint directory, atomically, as `published`."""
    # Facts that were read have their version with them.
    text = json.dumps({"manifest_version": MANIFEST_VERSION, **published(fields)}, indent=2) + "\n"
    write_atomically(directory / MANIFEST_FILE, text.encode())


def add_to_manifest(directory: Path, fields: dict[str, Any]) -> None:
    """Add facts that were learnt after a checkpoint was written to its manifest."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} has no {MANIFEST_FILE}")
    write_manifest(directory, {**manifest, **fields})


@contextmanager
def refusing_damage(directory: Path) -> Iterator[None]:
    """Turn what is missing in a manifest, or of another type, into one `CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        path = directory / MANIFEST_FILE
        raise CheckpointError(
            f"{path} is damaged ({repr(error)[:200]}); prune the model again"
        ) from error


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint, or None if cfsp did not write the checkpoint."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    with refusing_bad_json(path, "is damaged; prune the model again"):
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = fields["manifest_version"]
    if found != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has manifest version {found}, expected {MANIFEST_VERSION}; "
            "use the version of cfsp that wrote it"
        )
    return fields
