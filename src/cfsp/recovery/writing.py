"""A recovered model as a checkpoint of the same layout as the pruned one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.own_files import (
    CARD_FILE,
    CONFIG_FILE,
    MODELING_FILE,
    PLAN_FILE,
    copy_travelling_files,
    digests_beside_weights,
)
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.tensor_file import write_shards
from cfsp.planning.plan_file import PruningPlan
from cfsp.recovery.prepare import Prepared
from cfsp.recovery.trainer import TrainingOutcome
from cfsp.result.card import model_card, origin_of
from cfsp.result.manifest import read_manifest, write_manifest
from cfsp.streaming.runtime import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_recovered_weights(
    source: Checkpoint, model: PreTrainedModel, trained: Collection[str], directory: Path
) -> dict[str, str]:
    """Write the trained weights of the model and all others byte for byte; return digests."""

    def value(name: str) -> torch.Tensor:
        tensor: torch.Tensor = model.get_parameter(name).detach()
        return tensor.to("cpu", source.parameters[name].dtype)

    changed = {name: source.parameters[name] for name in trained}
    outgoing = list(source.stored.outgoing(source.chunks, changed, value, source.config))
    assert {tensor.name for tensor in outgoing} == source.specs.keys()
    return write_shards(directory, outgoing)


def copy_everything_else(source: Checkpoint, directory: Path) -> None:
    """Copy config, modelling file, plan, tokenizer and the like."""
    copy_travelling_files(source.directory, directory)
    for name in (CONFIG_FILE, MODELING_FILE, PLAN_FILE):
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / name)
    if source.quantisation is not None:
        fields = read_plain_fields(source.directory)
        (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_record(
    ready: Prepared,
    report: TrainingOutcome,
    directory: Path,
    digests: dict[str, str],
    command: str,
) -> None:
    """Write the manifest and the model card: those of the pruned model and how it was recovered."""
    settings, teacher = ready.settings, ready.teacher
    libraries = ["accelerate"] if settings.adaptation.method == "full" else ["accelerate", "peft"]
    now = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), **{name: version(name) for name in libraries}},
    }
    recovery = {
        "adaptation": asdict(settings.adaptation),
        "training": asdict(settings.training),
        "teacher": teacher and {"name": teacher.label, "weight": settings.training.teacher_weight},
        "data": {
            "sources": ready.text.sources,
            "tokens_digest": ready.text.train.digest,
            "bos": ready.text.bos,
        },
        "device": str(compute_device(settings.compute.device)),
        "threads": torch.get_num_threads(),
        **asdict(report),
    }
    manifest = read_manifest(ready.source.directory) or {}
    pruned = {key: manifest[key] for key in (*now, "files", "perplexity") if key in manifest}
    manifest |= {
        **now,
        "operation": "recover",
        "files": digests | digests_beside_weights(directory),
        "pruned": pruned,
        "recovery": recovery,
    }
    write_manifest(directory, manifest)
    path = directory / PLAN_FILE
    plan = PruningPlan.load(path) if path.is_file() else None
    card = model_card(manifest, plan, origin_of(ready.source))
    (directory / CARD_FILE).write_text(card, encoding="utf-8")
