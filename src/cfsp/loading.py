"""Loading a whole model, pruned or not, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.locating import locate_model
from cfsp.checkpoint.modeling_code import is_our_modeling_code
from cfsp.checkpoint.reading import Checkpoint
from cfsp.progress import library_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a model into memory through transformers, in evaluation mode.

    A pruned checkpoint whose blocks differ brings a modelling file. It is run only if it is
    byte for byte the one that this package writes; no other remote code is ever run.

    Args:
        name: a directory, a .gguf file, a hub id, or `demo`.
        dtype: what weights become; `auto` keeps what is stored.
        device: where the model goes; None for the CPU.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
    """
    from transformers import AutoModelForCausalLM

    directory = locate_model(name)
    checkpoint = Checkpoint(directory, str(name))
    if isinstance(dtype, str):
        dtype = compute_dtype(checkpoint, dtype)
    with library_progress():
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=is_our_modeling_code(directory)
        )
    if device is not None:
        model = model.to(device)
    return model.eval()


def compute_dtype(source: Any, name: str = "auto") -> torch.dtype:
    """Return a dtype by name; `auto` is the dtype of the model's first down projection.

    Args:
        source: a `WeightSource`.
        name: auto, float32, bfloat16 or float16.
    """
    if name == "auto":
        stored: torch.dtype = source.specs[source.family.weight_name(0, source.family.down)].dtype
        return stored
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def compute_device(name: str = "auto") -> torch.device:
    """Return a device by name; `auto` is an accelerator if there is one, else the CPU.

    Raises:
        UsageError: torch cannot use that device here.
    """
    from cfsp.errors import UsageError

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch cannot use the device {name!r} here: {str(error).splitlines()[0]}"
        ) from error
    return device
