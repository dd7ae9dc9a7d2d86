"""A recovered model as a checkpoint of the same layout as the pruned one."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.modeling_code import MODELING_FILE, code_digests
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.checkpoint.shards import write_shards
from cfsp.checkpoint.tensor_file import OutgoingTensor
from cfsp.checkpoint.writing import copy_travelling_files
from cfsp.recovery.data import RecoveryText
from cfsp.recovery.recover_report import RecoverReport
from cfsp.recovery.settings import Adaptation, TeacherChoice, Training
from cfsp.result.manifest import PLAN_FILE, read_manifest, versions, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CARD = "README.md"


def write_recovered_weights(
    source: Checkpoint, model: PreTrainedModel, trained: Collection[str], directory: Path
) -> dict[str, str]:
    """Write the weights: trained ones from the model, all others byte for byte.

    Args:
        source: the pruned checkpoint.
        model: the trained plain model.
        trained: names of the tensors that training changed.
        directory: an existing directory.

    Returns:
        File name -> SHA-256.
    """
    for name in trained:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to("cpu", source.specs[name].dtype)
    changed = LoadedModel(model)
    origin: dict[str, WeightSource] = dict.fromkeys(source.specs, source)
    origin |= dict.fromkeys(trained, changed)
    outgoing = [
        OutgoingTensor(name, spec, partial(origin[name].chunks, name))
        for name, spec in source.specs.items()
    ]
    assert all(changed.specs[name] == source.specs[name] for name in trained)
    return write_shards(directory, outgoing).digests


def copy_everything_else(source: Checkpoint, directory: Path) -> None:
    """Copy config, modelling file, plan, tokenizer and the like."""
    copy_travelling_files(source.directory, directory)
    for name in ("config.json", MODELING_FILE, PLAN_FILE):
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / name)


def recovery_facts(
    report: RecoverReport,
    text: RecoveryText,
    training: Training,
    adaptation: Adaptation,
    teacher: TeacherChoice | None,
    *,
    device: torch.device,
    command: str,
) -> dict[str, Any]:
    """Return what the manifest says of a recovery, as JSON types."""
    libraries = ["accelerate"] if adaptation.method == "full" else ["accelerate", "peft"]
    return {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), **{name: version(name) for name in libraries}},
        "adaptation": asdict(adaptation),
        "training": asdict(training),
        "teacher": {"name": teacher.name, **asdict(teacher.distillation)} if teacher else None,
        "data": {"sources": text.sources, "tokens_digest": text.train.digest},
        "device": str(device),
        "threads": torch.get_num_threads(),
        **asdict(report),
    }


def write_record(
    source: Checkpoint, directory: Path, recovery: dict[str, Any], digests: dict[str, str]
) -> None:
    """Write the manifest and the model card: those of the pruned model and how it was recovered.

    Args:
        source: the pruned checkpoint.
        directory: the new checkpoint.
        recovery: the facts; `command`, `created` and `versions` move to the top.
        digests: of the weight files.
    """
    manifest = read_manifest(source.directory) or {}
    top = ("command", "created", "versions")
    pruned = {key: manifest[key] for key in (*top, "files", "perplexity") if key in manifest}
    manifest |= {key: recovery[key] for key in top}
    manifest |= {
        "operation": "recover",
        "files": digests | code_digests(directory),
        "pruned": pruned,
        "recovery": {key: value for key, value in recovery.items() if key not in top},
    }
    manifest.pop("manifest_version", None)
    write_manifest(directory, manifest)
    card = source.directory / _CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {directory.name}\n"
    (directory / _CARD).write_text(
        f"{text.rstrip()}\n\n{recovery_section(recovery)}", encoding="utf-8"
    )


def recovery_section(recovery: dict[str, Any]) -> str:
    """Return the model card's section on recovery."""
    training = recovery["training"]
    adaptation = recovery["adaptation"]
    how = (
        "all weights of the targeted projections"
        if adaptation["method"] == "full"
        else f"{adaptation['method']} of mean rank {adaptation['rank']:g}, "
        f"ranks by {adaptation['allocation']}, merged into the weights"
    )
    teacher = recovery["teacher"]
    texts = ", ".join(
        f"{_code(name)} ({count} windows)" for name, count in recovery["data"]["sources"].items()
    )
    lines = [
        "## How it was recovered\n",
        f"    {' '.join(recovery['command'].split())}\n",
        f"- trained: {how}; targets: {adaptation['targets']}; "
        f"{recovery['trainable_parameters']:,} trainable parameters",
        f"- text: {texts} of {training['seqlen']} tokens",
        f"- {recovery['steps']} steps of {recovery['tokens_in_step']:,} tokens in "
        f"{recovery['seconds']['train'] / 60:.1f} minutes, peak learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}",
    ]
    if teacher is not None:
        lines.append(
            f"- distilled from {_code(teacher['name'])}, weight {teacher['weight']:g}, "
            f"temperature {teacher['temperature']:g}"
        )
    if recovery["perplexity"]:
        lines += ["", "| perplexity on | pruned | recovered | tokens |", "|---|---:|---:|---:|"]
        lines += [
            f"| {_cell(text)} | {value['before']:.2f} | {value['after']:.2f} "
            f"| {value['tokens']:,} |"
            for text, value in recovery["perplexity"].items()
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return _code(text).replace("|", r"\|")


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"
