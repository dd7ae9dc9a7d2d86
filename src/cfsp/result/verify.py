"""Is a checkpoint what its manifest says? Files, plan, parameters, and a forward pass.

Everything is read once and the forward pass goes block by block, so a checkpoint that is larger
than memory can be verified too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, digests_beside_weights, sha256_of
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CfspError, CheckpointError
from cfsp.planning.plan_file import PruningPlan
from cfsp.progress import item_progress
from cfsp.result.manifest import digest_of_plan, read_manifest
from cfsp.settings import Compute
from cfsp.streaming.runtime import runtime_of
from cfsp.text.windows import Windows

_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One promise of the manifest, and what is wrong with it in one sentence; None for nothing."""

    name: str
    problem: str | None


def verify_checkpoint(source: Checkpoint, compute: Compute) -> list[Check]:
    """Check a checkpoint that cfsp wrote, whose shards are whole for it opens, by its manifest."""
    directory, manifest = source.directory, read_manifest(source.directory)
    if manifest is None:
        raise CheckpointError(
            f"{source.label} has no {MANIFEST_FILE}: cfsp did not write it, so there is nothing to "
            "verify it against"
        )
    checks: dict[str, Callable[[], str | None]] = {
        "weights, config, tokenizer, chat templates and code are those that were written": lambda: (
            _files(directory, manifest)
        ),
        "the plan is the one that was obeyed": lambda: _plan(directory, manifest),
        "the number of parameters is right": lambda: _parameters(source, manifest),
        "weights and activations are finite": lambda: _forward(source, compute),
    }
    found = []
    with item_progress("verify", len(checks), "check") as bar:
        for name, check in checks.items():
            try:
                problem = check()
            except CfspError as error:
                problem = str(error)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                problem = f"{MANIFEST_FILE} is damaged ({error!r})"
            found.append(Check(name, problem))
            bar.update()
    return found


def _files(directory: Path, manifest: dict[str, Any]) -> str | None:
    promised, beside = manifest.get("files", {}), digests_beside_weights(directory)
    # Loaders read them all.
    weights = {path.name for path in directory.glob("*.safetensors")}
    if not any(name.endswith(".safetensors") for name in promised):
        return f"{MANIFEST_FILE} names no weight files"
    if missing := sorted(promised.keys() - weights - beside.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted((weights | beside.keys()) - promised.keys()):
        return f"{extra[0]} is not in {MANIFEST_FILE}"
    for name in sorted(promised):
        if promised[name] != (beside[name] if name in beside else sha256_of(directory / name)):
            return f"{name} has changed since it was written"
    return None


def _plan(directory: Path, manifest: dict[str, Any]) -> str | None:
    if not (directory / PLAN_FILE).is_file():
        return f"{PLAN_FILE} is missing"
    found = digest_of_plan(PruningPlan.load(directory / PLAN_FILE))
    return None if found == manifest.get("plan_digest") else f"{PLAN_FILE} has changed"


def _parameters(source: Checkpoint, manifest: dict[str, Any]) -> str | None:
    found, expected = parameter_count(source), manifest["parameters_after"]
    return None if found == expected else f"{found:,} were found, {expected:,} were promised"


def _forward(source: Checkpoint, compute: Compute) -> str | None:
    runtime = runtime_of(compute, source)
    # Any tokens do: what is asked is whether numbers come out.
    generator = torch.Generator().manual_seed(0)
    token_NT = torch.randint(vocabulary_of(source.config), (1, _TOKENS), generator=generator)
    calibrate(source, Windows(token_NT, {}), runtime)
    return None
