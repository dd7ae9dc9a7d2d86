"""How the weights of a pruned model are trained: by low-rank adapters, or themselves.

LoRA: W + (alpha / r) B A (Hu et al., arXiv 2106.09685). The scale alpha / r is the same in every
block whatever its rank, so both PEFT's `rank_pattern` and its `alpha_pattern` are set.

Routed experts are parameters and not modules: PEFT adapts one as W + (alpha / r) B A with a B and
an A for every expert. Whether it can for a class is tried on a small random model of it: the
adapted block computes what the merged one does, and gradients reach the adapter. PEFT also takes
names such as `gate_proj` for matrices of experts in older versions of transformers and trains the
experts instead (https://github.com/huggingface/peft/issues/3711).
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.small_run import SmallRun, run_small
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import blocks_of, empty_model, stock_config
from cfsp.errors import MissingExtraError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture, Unit
    from cfsp.recovery.settings import Method

# alpha / r.
SCALE = 2.0
# Of the adapters of experts that are tried.
_TOLERANCE = 1e-4
_RANK = 2


@dataclass(frozen=True)
class BlockTargets:
    """What is trained in one block, by full names in the model."""

    matrices: tuple[str, ...]  # modules that multiply by one matrix
    experts: tuple[str, ...]  # parameters that hold a matrix of every routed expert
    rank: int | None  # of the adapters; None in full training


def check_installed(method: Method) -> None:
    """Check that the libraries that a method trains with are there."""
    needed = ["accelerate", "peft"] if method == "lora" else ["accelerate"]
    if not all(importlib.util.find_spec(name) for name in needed):
        raise MissingExtraError("LoRA" if method == "lora" else "recovery", "recover")


def attach(
    model: PreTrainedModel, architecture: Architecture, targets: Sequence[BlockTargets]
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
        lora_alpha=SCALE * largest,
        target_modules=matrices,
        **({"target_parameters": experts} if experts else {}),
        rank_pattern=rank_of,
        alpha_pattern={pattern: SCALE * rank for pattern, rank in rank_of.items()},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings(), _names_as_they_are():
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


def why_experts_stay(
    config: PreTrainedConfig, architecture: Architecture, method: Method
) -> str | None:
    """Return why the experts of a model cannot be trained, in a few words; None if they can."""
    if method == "full":
        return None
    stock = stock_config(config)
    run = run_small(stock, model_class_of(stock), architecture)
    tried: set[tuple[object, ...]] = set()
    for unit in run.architecture.units:
        if unit.routed and unit.form not in tried:
            tried.add(unit.form)
            if (reason := _fails(run, unit)) is not None:
                return f"PEFT {version('peft')} cannot adapt those of this class ({reason})"
    return None


def _fails(run: SmallRun, unit: Unit) -> str | None:
    """Return what goes wrong when the experts of a unit are adapted; None if nothing does."""
    import peft

    original = run.blocks[unit.block]
    # Blocks of the small model share their weights.
    block: Any = copy.deepcopy(original)
    names = [name for name in dict.fromkeys((unit.gate, unit.up, unit.down)) if name]
    try:
        config = peft.LoraConfig(r=_RANK, target_modules=[], target_parameters=names)
        adapted: Any = peft.LoraModel(block, config, "default")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        if len(trained) != 2 * len(names):
            return f"{len(trained)} of {2 * len(names)} adapters were made"
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        run.blocks[unit.block] = block
        with torch.enable_grad():
            output = run.output(unit.block)
            torch.autograd.backward(output.square().sum())
        if not all(p.grad is not None and bool(p.grad.any()) for p in trained):
            return "gradients do not reach the adapters"
        with torch.no_grad():
            run.blocks[unit.block] = adapted.merge_and_unload(safe_merge=True)
            merged = run.output(unit.block)
            run.blocks[unit.block] = original
            plain = run.output(unit.block)
    except Exception as error:  # whatever PEFT or the class make of it
        return first_line(error)
    finally:
        run.blocks[unit.block] = original
    largest = output.abs().max()
    if not bool((merged - output).abs().max() <= _TOLERANCE * largest):
        return "the merged experts compute something else"
    if not bool((plain - output).abs().max() > _TOLERANCE * largest):
        return "the adapters change nothing"
    return None


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Keep PEFT from taking names of today's modules for older ones, while the context lasts."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # older ones leave names alone
        yield
        return
    original = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def check_adapter_can_be_read(source: Checkpoint, targets: Sequence[BlockTargets]) -> None:
    """Refuse to keep an adapter that PEFT would put in the wrong place."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older ones leave names alone
        return
    import peft

    names = [name for block in targets for name in block.matrices]
    config = peft.LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(
            config, model=empty_model(source.config), conversions=None
        )
        left = set(config.target_modules)
    except ValueError:  # only some of what it takes for parts of one matrix
        left = set()
    misread = next((name for name in names if name not in left), None)
    if misread is not None:
        raise UsageError(
            f"PEFT {version('peft')} cannot read such an adapter of a {source.config.model_type} "
            f"model again: it takes {misread} for a matrix of experts (huggingface/peft issue "
            "3711); leave --keep-adapter out, the recovered model has the adapter merged"
        )
