"""Is a checkpoint what its manifest says? Files, plan, shapes, and a forward pass.

Everything is read once and the forward pass goes block by block, so a checkpoint that is larger
than memory can be verified too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.architecture.discovery import find_architecture
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.own_files import (
    CONFIG_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    digests_beside_weights,
    sha256_of,
)
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CfspError, CheckpointError
from cfsp.planning.plan_file import PruningPlan
from cfsp.progress import item_progress
from cfsp.result.manifest import read_manifest
from cfsp.settings import Compute, Part
from cfsp.streaming.runtime import runtime_of
from cfsp.text.windows import Windows

_TOKENS = 16
_BESIDE = "config, tokenizer, chat templates and code are those that were written"
_ONLY_CODE = (
    "code is what was written (the manifest is too old to have those of config and tokenizer)"
)


@dataclass(frozen=True)
class Check:
    """One promise of the manifest, and what is wrong with it in one sentence; None for nothing."""

    name: str
    problem: str | None


def verify_checkpoint(source: Checkpoint, compute: Compute) -> list[Check]:
    """Check a checkpoint that cfsp wrote against its manifest.

    That it opens means that its shards are whole and that cfsp knows its config.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    directory, manifest = source.directory, read_manifest(source.directory)
    if manifest is None:
        raise CheckpointError(
            f"{source.label} has no {MANIFEST_FILE}: cfsp did not write it, so there is nothing to "
            "verify it against"
        )
    # All have the digests of config and tokenizer since December 2026.
    has_all = CONFIG_FILE in manifest.get("files", {})
    checks: dict[str, Callable[[], str | None]] = {
        "weight files are those that were written": lambda: _weights(directory, manifest),
        "the plan is the one that was obeyed": lambda: _plan(directory, manifest),
        "widths are those of the plan": lambda: next(_other_widths(source, manifest), None),
        "the number of parameters is right": lambda: _parameters(source, manifest),
        _BESIDE if has_all else _ONLY_CODE: lambda: _beside(directory, manifest, has_all),
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


def _weights(directory: Path, manifest: dict[str, Any]) -> str | None:
    # Loaders read them all.
    there = {path.name for path in directory.glob("*.safetensors")}
    promised = {k: v for k, v in manifest.get("files", {}).items() if k.endswith(".safetensors")}
    if not promised:
        return f"{MANIFEST_FILE} names no weight files"
    return _difference(promised, there, lambda name: sha256_of(directory / name))


def _beside(directory: Path, manifest: dict[str, Any], has_all: bool) -> str | None:
    promised = manifest.get("files", {})
    promised = {k: v for k, v in promised.items() if not k.endswith(".safetensors")}
    found = digests_beside_weights(directory)
    if not has_all:
        found = {name: digest for name, digest in found.items() if name.endswith(".py")}
    return _difference(promised, set(found), found.__getitem__)


def _difference(
    promised: dict[str, str], there: set[str], digest_of: Callable[[str], str]
) -> str | None:
    if missing := sorted(promised.keys() - there):
        return f"{missing[0]} is missing"
    if extra := sorted(there - promised.keys()):
        return f"{extra[0]} is not in {MANIFEST_FILE}"
    changed = [name for name in sorted(promised) if digest_of(name) != promised[name]]
    return f"{changed[0]} has changed since it was written" if changed else None


def _plan(directory: Path, manifest: dict[str, Any]) -> str | None:
    if not (directory / PLAN_FILE).is_file():
        return f"{PLAN_FILE} is missing"
    text = PruningPlan.load(directory / PLAN_FILE).to_json()
    found = hashlib.sha256(text.encode()).hexdigest()
    return None if found == manifest.get("plan_digest") else f"{PLAN_FILE} has changed"


def _other_widths(source: Checkpoint, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield where the config or the manifest says another width than the plan."""
    plan = PruningPlan.load(source.directory / PLAN_FILE)
    nouns: dict[Part, str] = {"ffn": "FFNs", "kv": "attentions"}
    for part, noun in nouns.items():
        units = [unit for unit in plan.kept_units if unit.part == part]
        if not units:
            continue
        planned = [unit.kept_width for unit in units]
        # With equally many in all blocks it is a stock model, which was not opened with its heads.
        found = [unit for unit in source.architecture.stock_units if unit.part == part]
        goes_whole = part == "kv" and "attention" in plan.criterion.get("parts", ())
        kind: Part = "attention" if goes_whole else part
        found = found or list(find_architecture(empty_model(source.config), kind).units)
        told = manifest["intermediate_sizes"] if part == "ffn" else manifest["kv_groups"]["after"]
        for name, widths in (
            ("config.json", [unit.width for unit in found]),
            (MANIFEST_FILE, told),
        ):
            if len(widths) != len(planned):
                yield f"{name} tells of {len(widths)} {noun}, the plan of {len(planned)}"
            for unit, width in zip(units, widths, strict=False):
                if width != unit.kept_width:
                    yield (
                        f"block {unit.name} is {width} wide in {name}, {unit.kept_width} in the "
                        "plan"
                    )
    experts = [unit.ffns for unit in source.architecture.of_part("ffn").units]
    kept = [len(unit.kept_ffns) for unit in plan.kept_units if unit.part == "ffn"]
    if experts != kept:
        yield f"config.json says that FFNs have {experts} experts, the plan {kept}"


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
