"""The manifest `cfsp.json` of a checkpoint: what made it, from what, and under which conditions.

It has digests of the files, by which `cfsp verify` tells whether they are as they were written.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, digests_beside_weights, sha256_of
from cfsp.checkpoint.reading import Checkpoint, WeightSource
from cfsp.checkpoint.skeleton import PRUNED_KEY
from cfsp.errors import CheckpointError, damage_as, refusing_bad_json
from cfsp.planning.plan_file import PruningPlan
from cfsp.progress import item_progress
from cfsp.result.facts import texts_that_made
from cfsp.result.names import public_command, public_name

MANIFEST_VERSION = 2
_AGAIN = "prune the model again"  # what to do about a damaged one

# What `cfsp inspect` tells, and what a model that was pruned in memory says of it in its config.
_IN_CONFIG = (
    "operation", "base_model", "criterion", "calibration", "removed_blocks", "removed_attentions",
    "ffn_sparsity", "kv_groups", "experts", "model_sparsity", "parameters_before", "repair",
    "recovery", "pruned", "perplexity", "command", "created", "versions",
)  # fmt: skip


def facts_for_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a manifest that travels in the config of a model in memory."""
    goal = {"goal": manifest["goal"]} if manifest.get("goal") else {}
    return {key: manifest[key] for key in _IN_CONFIG if key in manifest} | goal


def digest_of_plan(plan: PruningPlan) -> str:
    """Return what a manifest has of the plan beside it."""
    return sha256(plan.to_json().encode()).hexdigest()


def plan_beside(directory: Path) -> PruningPlan | None:
    """Return the plan of a checkpoint; None if it was not pruned by one."""
    path = directory / PLAN_FILE
    return PruningPlan.load(path) if path.is_file() else None


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
    write_manifest(directory, {**(read_manifest(directory) or {}), **fields})


def refusing_damage(directory: Path, instead: str = _AGAIN) -> AbstractContextManager[None]:
    """Turn what is missing in a manifest, or of another type, into one `CheckpointError`."""
    return damage_as(CheckpointError, directory / MANIFEST_FILE, instead)


def read_manifest(directory: Path, instead: str = _AGAIN) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint, or None if cfsp did not write the checkpoint."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    with refusing_bad_json(path, f"is damaged; {instead}"):
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = fields["manifest_version"]
    if found != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has manifest version {found}, expected {MANIFEST_VERSION}; "
            "use the version of cfsp that wrote it"
        )
    return fields


def facts_about(source: WeightSource) -> dict[str, Any]:
    """Return the manifest of a checkpoint, or what one that was pruned in memory has in its config.

    Of a model in memory it is that of the directory that it was loaded from. Nothing if cfsp did
    not make it.
    """
    in_config, config = getattr(source.config, PRUNED_KEY, None), source.config
    place = source.directory if isinstance(source, Checkpoint) else config._name_or_path
    beside = read_manifest(Path(place)) if place else None
    return beside or dict(in_config if isinstance(in_config, dict) else {})


def history_of(source: WeightSource) -> dict[str, Any]:
    """Return what the record of a model made from this one says of where this one is from.

    That is the model that it was `made_from`, and on which `texts`; nothing if cfsp did not make
    it.
    """
    facts = facts_about(source)
    with refusing_damage(Path(source.label)):
        found = {"made_from": facts.get("base_model"), "texts": sorted(texts_that_made(facts))}
    return {key: value for key, value in found.items() if value}


def check_as_written(source: Checkpoint) -> int:
    """Check that the files of a checkpoint are those that were written; return how many.

    They are all that change what the model says, but not notes or licences, and the plan.
    """
    directory, manifest = source.directory, read_manifest(source.directory)
    if manifest is None:
        raise CheckpointError(
            f"{source.label} has no {MANIFEST_FILE}: cfsp did not write it, so there is nothing to "
            "verify it against"
        )
    with refusing_damage(directory):
        promised: dict[str, str] = dict(manifest["files"])
    found = digests_beside_weights(directory)
    weights = sorted(directory.glob("*.safetensors"))  # loaders read them all
    with item_progress("verify", len(weights), "file") as bar:
        for path in weights:
            found[path.name] = sha256_of(path)
            bar.update()
    # Of a model that was trained without being pruned there is none.
    if (of_plan := manifest.get("plan_digest")) is not None:
        promised[PLAN_FILE] = of_plan
    if (plan := plan_beside(directory)) is not None:
        found[PLAN_FILE] = digest_of_plan(plan)
    said = [f"{name} is missing" for name in sorted(promised.keys() - found.keys())]
    said += [f"{name} is not in {MANIFEST_FILE}" for name in sorted(found.keys() - promised.keys())]
    both = sorted(promised.keys() & found.keys())
    said += [f"{name} has changed" for name in both if promised[name] != found[name]]
    if said:
        raise CheckpointError(
            f"{source.label} is not what cfsp wrote: {'; '.join(said)}; prune again, or copy the "
            "checkpoint again"
        )
    return len(found)
