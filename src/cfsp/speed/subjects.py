"""What can be timed: a model by name, a .gguf file, or the shapes of one that lost something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.loading import compute_dtype, load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.checkpoint.skeleton import architecture_of, build_skeleton
from cfsp.settings import Part
from cfsp.speed.work import Footprint, work_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_INITIAL_RANGE = 0.02


@dataclass(frozen=True)
class SmallerModel:
    """A model with random weights in the shapes of another that lost something."""

    original: PreTrainedConfig  # stays as it is
    parts: tuple[Part, ...]  # may have lost something
    widths: tuple[int, ...]  # of every unit of these parts, in the blocks that stay
    removed: tuple[int, ...] = ()  # blocks that are gone

    def config(self) -> PreTrainedConfig:
        """Return the config."""
        architecture = architecture_of(self.original, self.parts)
        return pruned_config(self.original, architecture, self.widths, self.removed)


@dataclass(frozen=True)
class Subject:
    """One model to time, and what to call it."""

    model: str | Path | SmallerModel
    label: str


def build_model(
    subject: Subject, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    """Return the transformers model of a subject and its footprint."""
    if isinstance(subject.model, SmallerModel):
        return _random_model(subject.model.config(), getattr(torch, dtype_name), device)
    checkpoint = open_checkpoint(subject.model)
    dtype = compute_dtype(checkpoint, dtype_name)
    model = load(checkpoint.directory, dtype=dtype, device=device)
    size = sum(path.stat().st_size for path in checkpoint.directory.glob("*.safetensors"))
    work = work_of(checkpoint, dtype.itemsize)
    return model, Footprint(parameter_count(checkpoint), size, work)


def _random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    model = build_skeleton(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim == 1:
                values.fill_(1.0)
            else:
                values.uniform_(-_INITIAL_RANGE, _INITIAL_RANGE, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.to(device)
    source = LoadedModel(model)
    size = sum(spec.nbytes for spec in source.specs.values())
    return model, Footprint(parameter_count(source), size, work_of(source, dtype.itemsize))
