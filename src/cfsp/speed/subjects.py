"""What can be timed: a checkpoint by name, a true shape with random weights, a .gguf file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.loading import compute_dtype, load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.checkpoint.skeleton import build_skeleton
from cfsp.speed.shapes import ShapedModel, SmallerModel
from cfsp.speed.work import Footprint, work_of
from cfsp.speed.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the head is left out of needs no real vocabulary.
_SMALL_VOCABULARY = 256
_INITIAL_RANGE = 0.02


@dataclass(frozen=True)
class Subject:
    """One model to time.

    Attributes:
        model: a name as for prune, a .gguf file, or a shape.
        label: what to call it.
    """

    model: str | Path | ShapedModel | SmallerModel
    label: str

    @property
    def head(self) -> bool:
        """Whether the language-model head is timed.

        It is left out for a few blocks of a true shape, beside which it would weigh more than it
        does in the whole model.
        """
        return not isinstance(self.model, ShapedModel) or self.model.whole


def random_prompt(vocabulary: int, workload: Workload) -> Tensor:
    """Return tokens_BP of a workload, the same each time."""
    shape, generator = (workload.batch, workload.prompt), torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, shape, generator=generator)


def build_model(
    subject: Subject, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    """Return the transformers model of a subject and its footprint.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
    """
    if isinstance(subject.model, ShapedModel | SmallerModel):
        return _random_model(subject, subject.model, dtype_name, device)
    checkpoint = open_checkpoint(subject.model)
    dtype = compute_dtype(checkpoint, dtype_name)
    model = load(checkpoint.directory, dtype=dtype, device=device)
    work = work_of(checkpoint, head=subject.head, itemsize=dtype.itemsize)
    files = checkpoint.directory.glob("*.safetensors")
    size = sum(path.stat().st_size for path in files if not path.name.startswith("cfsp_"))
    return model, Footprint(parameter_count(checkpoint), size, work)


def _random_model(
    subject: Subject, shaped: ShapedModel | SmallerModel, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    dtype = getattr(torch, "bfloat16" if dtype_name == "auto" else dtype_name)
    config = shaped.config()
    if not subject.head:
        config.vocab_size = _SMALL_VOCABULARY
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
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
    in_blocks = set(source.stored.within(f"{source.architecture.blocks}."))
    timed = [spec for name, spec in source.specs.items() if subject.head or name in in_blocks]
    return model, Footprint(
        sum(spec.elements for spec in timed),
        sum(spec.nbytes for spec in timed),
        work_of(source, head=subject.head, itemsize=dtype.itemsize),
    )
