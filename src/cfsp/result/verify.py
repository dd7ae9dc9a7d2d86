"""Is a checkpoint what its manifest says? Files, plan, shapes, and a forward pass.

Everything is read once and the forward pass goes block by block, so a checkpoint that is larger
than memory can be verified too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.architecture.discovery import find_architecture
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.config_file import CONFIG_FILE
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.checkpoint.writing import digests_beside_weights
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
    """One promise of the manifest and whether it is kept.

    Attributes:
        name: what is checked.
        problem: what is wrong, in one sentence; None if nothing is.
    """

    name: str
    problem: str | None


def verify_checkpoint(source: Checkpoint, compute: Compute) -> list[Check]:
    """Check a checkpoint that cfsp wrote against its manifest.

    Args:
        source: the checkpoint; that it opens means that its shards are whole and its config is
            one that cfsp knows.
        compute: where and in what the forward pass computes.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(source.directory)
    if manifest is None:
        raise CheckpointError(
            f"{source.label} has no {MANIFEST_FILE}: cfsp did not write it, so there is nothing to "
            "verify it against"
        )
    checks: list[tuple[str, Callable[[], str | None]]] = [
        ("weight files are those that were written", lambda: _files(source.directory, manifest)),
        ("the plan is the one that was obeyed", lambda: _plan(source.directory, manifest)),
        ("widths are those of the plan", lambda: _widths(source, manifest)),
        ("the number of parameters is right", lambda: _parameters(source, manifest)),
        (
            _BESIDE if _has_all(manifest) else _ONLY_CODE,
            lambda: _beside(source.directory, manifest),
        ),
        ("weights and activations are finite", lambda: _forward(source, compute)),
    ]
    found = []
    with item_progress("verify", len(checks), "check") as bar:
        for name, check in checks:
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
    # Loaders read them all.
    there = {path.name for path in directory.glob("*.safetensors")}
    promised = {k: v for k, v in manifest.get("files", {}).items() if k.endswith(".safetensors")}
    if not promised:
        return f"{MANIFEST_FILE} names no weight files"
    return _difference(promised, there, lambda name: _digest(directory / name))


def _beside(directory: Path, manifest: dict[str, Any]) -> str | None:
    promised = manifest.get("files", {})
    promised = {k: v for k, v in promised.items() if not k.endswith(".safetensors")}
    found = digests_beside_weights(directory)
    if not _has_all(manifest):
        found = {name: digest for name, digest in found.items() if name.endswith(".py")}
    return _difference(promised, set(found), found.__getitem__)


def _has_all(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has the digests of config and tokenizer, as all do since December 2026."""
    return CONFIG_FILE in manifest.get("files", {})


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


def _widths(source: Checkpoint, manifest: dict[str, Any]) -> str | None:
    plan = PruningPlan.load(source.directory / PLAN_FILE)
    nouns: dict[Part, str] = {"ffn": "FFNs", "kv": "attentions"}
    problems = [_widths_of(part, nouns[part], source, plan, manifest) for part in nouns]
    problems.append(_experts(source, plan))
    return next((problem for problem in problems if problem is not None), None)


def _experts(source: Checkpoint, plan: PruningPlan) -> str | None:
    found = [unit.ffns for unit in source.architecture.of_part("ffn").units]
    planned = [len(unit.kept_ffns) for unit in plan.kept_units if unit.part == "ffn"]
    if found == planned:
        return None
    return f"config.json says that FFNs have {found} experts, the plan {planned}"


def _widths_of(
    part: Part, noun: str, source: Checkpoint, plan: PruningPlan, manifest: dict[str, Any]
) -> str | None:
    units = [unit for unit in plan.kept_units if unit.part == part]
    planned = [unit.kept_width for unit in units]
    if not units:
        return None
    # With equally many in all blocks the model is a stock one, which was not opened with its heads.
    found = [unit for unit in source.architecture.stock_units if unit.part == part]
    goes_whole = part == "kv" and "attention" in plan.criterion.get("parts", ())
    kind: Part = "attention" if goes_whole else part
    found = found or list(find_architecture(empty_model(source.config), kind).units)
    widths = [unit.width for unit in found]
    told = manifest["intermediate_sizes"] if part == "ffn" else manifest["kv_groups"]["after"]
    for name, numbers in (("config.json", widths), (MANIFEST_FILE, told)):
        different = [
            i for i, pair in enumerate(zip(numbers, planned, strict=False)) if len(set(pair)) > 1
        ]
        if len(numbers) != len(planned):
            return f"{name} tells of {len(numbers)} {noun}, the plan of {len(planned)}"
        if different:
            unit = different[0]
            return (
                f"block {units[unit].name} is {numbers[unit]} wide in {name}, {planned[unit]} "
                "in the plan"
            )
    return None


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


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
