"""How the weights of a pruned model are trained: by low-rank adapters, or themselves.

LoRA: W + (alpha / r) B A (Hu et al., arXiv 2106.09685). The scale alpha / r is the same in every
block whatever its rank, so both PEFT's `rank_pattern` and its `alpha_pattern` are set.
"""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.errors import MissingExtraError
from cfsp.recovery.expert_adapters import names_as_they_are
from cfsp.recovery.settings import Method
from cfsp.recovery.targets import BlockTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Architecture


def check_installed(method: Method) -> None:
    """Check that the libraries that a method trains with are there."""
    needed = ["accelerate"] if method == "full" else ["accelerate", "peft"]
    if not all(importlib.util.find_spec(name) for name in needed):
        raise MissingExtraError("recovery" if method == "full" else "LoRA", "recover")


def attach(
    model: PreTrainedModel,
    architecture: Architecture,
    targets: Sequence[BlockTargets],
    scale: float,
) -> nn.Module:
    """Make a model trainable; return what to train: a PEFT model, or the same one without ranks.

    Trained tensors are float32 whatever the model is: updates are smaller than bfloat16 resolves.
    The plain model is changed in place.
    """
    matrices = [name for block in targets for name in block.matrices]
    experts = [name for block in targets for name in block.experts]
    model.requires_grad_(False)
    rank_of = {
        rf"{re.escape(architecture.blocks)}\.{index}\..*": block.rank
        for index, block in enumerate(targets)
        if block.rank is not None
    }
    if not rank_of:
        trained = [p for name in matrices for p in model.get_submodule(name).parameters()]
        for parameter in (*trained, *map(model.get_parameter, experts)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return cast(nn.Module, model)
    import peft

    largest = max(rank_of.values())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=largest,
        lora_alpha=scale * largest,
        target_modules=matrices,
        **({"target_parameters": experts} if experts else {}),
        rank_pattern=rank_of,
        alpha_pattern={pattern: scale * rank for pattern, rank in rank_of.items()},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings(), names_as_they_are():
        # PEFT asks transformers for an attribute whose name is going away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # It does not look at parameters when it says so.
        warnings.filterwarnings("ignore", ".*keys did not match any targeted", RuntimeWarning)
        return cast(nn.Module, peft.get_peft_model(model, config))


def trainable_in_blocks(
    model: PreTrainedModel, architecture: Architecture, targets: Sequence[BlockTargets]
) -> list[dict[str, int | None]]:
    """Return `rank` and number of trainable `parameters` of each block of a plain model."""
    return [
        {
            "rank": of_block.rank,
            "parameters": sum(p.numel() for p in block.parameters() if p.requires_grad),
        }
        for of_block, block in zip(targets, blocks_of(model, architecture), strict=True)
    ]


def trained_parameters(model: PreTrainedModel, targets: Sequence[BlockTargets]) -> list[str]:
    """Return the names of the parameters of a plain model that training changes.

    Adapters leave biases as they are, full training does not.
    """
    names: list[str] = []
    for block in targets:
        for matrix in block.matrices:
            of_matrix = dict(model.get_submodule(matrix).named_parameters())
            keys = of_matrix if block.rank is None else ("weight",)
            names += [f"{matrix}.{key}" for key in keys]
        names += block.experts
    return names


def size_of_weights(model: PreTrainedModel, names: Sequence[str]) -> float:
    """Return the root mean square of the matrices among these parameters."""
    squares, count = 0.0, 0
    for name in names:
        weights = model.get_parameter(name)
        if weights.ndim > 1:  # biases have sizes of their own
            squares += float(weights.detach().float().square().sum())
            count += weights.numel()
    return math.sqrt(squares / count)


def save_adapter(adapted: Any, source: Checkpoint, directory: Path) -> None:
    """Write the adapters of a PEFT model, to be put onto the pruned checkpoint."""
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(source.directory)
    adapted.save_pretrained(str(directory))


def merge(model: nn.Module) -> PreTrainedModel:
    """Return the plain model with its adapters merged into its weights."""
    unload: Any = getattr(model, "merge_and_unload", None)
    merged: PreTrainedModel = unload(safe_merge=True) if unload is not None else model
    merged.requires_grad_(False)
    return merged
