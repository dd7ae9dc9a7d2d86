"""The tensors of a checkpoint in one file, and which of them differ from another's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of the tensors that differ; names, shapes and types must be the same."""
    old, new = tensors(before), tensors(after)
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {
        k: (v.shape, v.dtype) for k, v in new.items()
    }
    return {name for name in old if not torch.equal(old[name], new[name])}
