"""Which weights of a pruned model are trained, and how: low-rank adapters or the weights.

LoRA: W + (alpha / r) B A (Hu et al., arXiv 2106.09685). The scale alpha / r is the same in every
block whatever its rank, so both PEFT's `rank_pattern` and its `alpha_pattern` are set. DoRA adds
a trained length for every row (arXiv 2402.09353).
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.errors import MissingExtraError, UsageError
from cfsp.recovery.settings import Adaptation, Method, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Architecture, FFNUnit

logger = logging.getLogger(__name__)
# GPT-2 keeps its matrices transposed, in a class of its own.
_MATRICES = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class TrainableBlock:
    """Rank (None in full training) and number of trainable parameters of one block."""

    rank: int | None
    parameters: int


def check_installed(method: Method) -> None:
    """Check that the libraries that a method trains with are there.

    Raises:
        MissingExtraError: one is not.
    """
    needed = ["accelerate"] if method == "full" else ["accelerate", "peft"]
    if not all(importlib.util.find_spec(name) for name in needed):
        raise MissingExtraError("recovery" if method == "full" else "LoRA", "recover")


def target_names(
    model: PreTrainedModel, architecture: Architecture, targets: Targets
) -> list[list[str]]:
    """Return the full names of the projections to train, block by block.

    Experts are parameters of one module, which LoRA's modules cannot adapt: they are never among
    them.

    Raises:
        UsageError: there is no such projection.
    """
    names: list[list[str]] = []
    for index, block in enumerate(blocks_of(model, architecture)):
        linear = [name for name, module in block.named_modules() if isinstance(module, _MATRICES)]
        in_ffn = _linear_in_ffn(linear, architecture.units_of(index))
        chosen = {
            "mlp": [name for name in linear if name in in_ffn],
            "attention": [name for name in linear if name not in in_ffn],
            "all": linear,
        }[targets]
        names.append([f"{architecture.block_prefix(index)}{name}" for name in chosen])
    if not any(names):
        raise UsageError(
            f"the FFN of a {model.config.model_type} model is all experts, which cannot be trained "
            "yet; use --targets attention"
        )
    if architecture.has_experts:
        logger.info("experts stay as they are, everything else is trained")
    return names


def _linear_in_ffn(linear: Sequence[str], units: Sequence[FFNUnit]) -> set[str]:
    """Return the matrices of FFNs, and what lies beside these in the same module."""
    matrices = {name.removesuffix(".weight") for unit in units for name in unit.axes}
    modules = tuple(f"{unit.path.partition('.')[0]}." for unit in units if unit.path)
    return {name for name in linear if name in matrices or name.startswith(modules)}


def attach(
    model: PreTrainedModel,
    architecture: Architecture,
    adaptation: Adaptation,
    rank_L: Sequence[int] | None,
) -> tuple[nn.Module, list[TrainableBlock]]:
    """Make a model trainable.

    Trained tensors are float32 whatever the model is: updates are smaller than bfloat16 resolves.

    Args:
        model: the pruned model; it is changed in place.
        architecture: of the model.
        adaptation: what to train.
        rank_L: of every block; None for full training.

    Returns:
        The model to train (a PEFT model, or the same one) and what is trainable in each block.

    Raises:
        UsageError: there is nothing to train.
    """
    names = target_names(model, architecture, adaptation.targets)
    model.requires_grad_(False)
    if rank_L is None:
        for name in (name for block in names for name in block):
            for parameter in model.get_submodule(name).parameters():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return model, _trainable(model, architecture, [None] * len(names))
    import peft

    patterns = [rf"{re.escape(architecture.blocks)}\.{block}\..*" for block in range(len(rank_L))]
    largest = max(rank_L)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=largest,
        lora_alpha=adaptation.scale * largest,
        target_modules=[name for block in names for name in block],
        rank_pattern=dict(zip(patterns, rank_L, strict=True)),
        alpha_pattern={
            pattern: adaptation.scale * rank for pattern, rank in zip(patterns, rank_L, strict=True)
        },
        use_dora=adaptation.method == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute whose name is going away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted: Any = peft.get_peft_model(model, config)
    return adapted, _trainable(model, architecture, rank_L)


def trained_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names, in the plain model, of the tensors that training will change.

    Args:
        model: the plain model inside, after `attach`.
    """
    adapted = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    if adapted:
        return [f"{name.removesuffix('.base_layer')}.weight" for name in adapted]
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


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


def _trainable(
    model: PreTrainedModel, architecture: Architecture, rank_L: Sequence[int | None]
) -> list[TrainableBlock]:
    return [
        TrainableBlock(rank, sum(p.numel() for p in block.parameters() if p.requires_grad))
        for rank, block in zip(rank_L, blocks_of(model, architecture), strict=True)
    ]
