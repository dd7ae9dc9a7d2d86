"""Which weights of a pruned model are trained, by low-rank adapters or themselves, and how.

LoRA: W + (alpha / r) B A (Hu et al., arXiv 2106.09685). Ranks are equal, or adapters of a block
have one of their own (CFSP, Eq. 9: r_l proportional to s_l). The scale alpha / r is the same in
every block whatever its rank, so both PEFT's `rank_pattern` and its `alpha_pattern` are set.

Routed experts are parameters and not modules. Full training trains them; adapters leave them as
they are, because PEFT would hold W + (alpha / r) B A of all experts once more in every step.

Shapes: L blocks.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsp.architecture.found import Architecture
from cfsp.checkpoint.loading import compute_dtype, load
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import blocks_of, empty_model
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import PlanError, RecoveryError, UsageError
from cfsp.planning.allocation import round_widths, water_fill
from cfsp.planning.plan_file import PruningPlan
from cfsp.recovery.settings import Adaptation

logger = logging.getLogger(__name__)
SCALE = 2.0  # alpha / r


def trained_parameters(source: Checkpoint, *, is_full: bool) -> list[str]:
    """Return the full names of what training changes; they are known before a weight is read.

    Adapters leave biases as they are, and what may be computed without them.
    """
    model, architecture = empty_model(source.config), source.architecture
    found = []
    for index, block in enumerate(blocks_of(model, architecture)):
        matrices = [n for n, each in block.named_modules() if multiplies_by_its_matrix(each)]
        if is_full:
            names = [
                f"{m}.{n}" for m in matrices for n, _ in block.get_submodule(m).named_parameters()
            ]
            routed = [unit for unit in architecture.units_of(index) if unit.routed]
            names += [name for u in routed for name in (u.gate, u.up, u.down) if name]
        else:
            names = [f"{name}.weight" for name in matrices if not _may_be_bypassed(block, name)]
        prefix = architecture.block_prefix(index)
        found += [prefix + name for name in dict.fromkeys(names)]
    if architecture.has_experts and not is_full:
        logger.info(
            "experts have no adapters and stay as they are, everything else is trained; "
            "--method full trains them, too"
        )
    return found


def multiplies_by_its_matrix(module: nn.Module) -> bool:
    """Return whether a module's output is its input times its matrix, plus its bias if any.

    Of a class made from `nn.Linear` that is tried: some routers also choose, and some matrices
    are of groups.
    """
    kind = type(module)
    if kind not in _multiplies and isinstance(module, nn.Linear):
        _multiplies[kind] = _is_linear(module)
    return _multiplies.get(kind, False)


# GPT-2 keeps its matrices transposed, in a class of its own.
_multiplies: dict[type[nn.Module], bool] = {nn.Linear: True, Conv1D: True}


def _is_linear(module: nn.Linear) -> bool:
    values = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    matrix, bias = values["weight"], values.get("bias")
    input_BI = torch.randn(2, matrix.shape[1])
    try:
        found = torch.func.functional_call(module, values, (input_BI,))
    except Exception:  # whatever a class wants of its input
        return False
    expected = nn.functional.linear(input_BI, matrix, bias)
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    )


def _may_be_bypassed(block: nn.Module, name: str) -> bool:
    """Return whether it is the last matrix of a state-space mixer.

    Fused kernels take its weight and never call the module, so that an adapter would not count;
    PEFT refuses to adapt it.
    """
    owner, _, leaf = name.rpartition(".")
    parameters = dict(block.get_submodule(owner).named_parameters(recurse=False))
    return leaf == "out_proj" and {"A_log", "D"} <= parameters.keys()


def ranks_of(source: Checkpoint, adaptation: Adaptation) -> list[int | None]:
    """Return the rank of every block's adapters; full training has none."""
    blocks, allocation = int(source.architecture.block_count), adaptation.allocation
    if adaptation.method == "full":
        return [None] * blocks
    hidden = int(text_config_of(source.config).hidden_size)
    if adaptation.rank > hidden:  # it would only take memory, until there is none
        raise UsageError(
            f"expected --rank of at most {hidden}, the hidden size, beyond which adapters hold no "
            f"more, found {adaptation.rank:g}; give less, or --method full"
        )
    weight_L = [1.0] * blocks
    if allocation != "uniform":
        weight_L = _importances(source)
        if min(weight_L) <= 0:
            raise UsageError(
                f"--rank-allocation {allocation} needs a positive importance for every block, "
                f"found {min(weight_L)}; use --rank-allocation uniform"
            )
    if allocation == "inverse":
        weight_L = [1 / weight for weight in weight_L]
    return [*allocate_ranks(weight_L, adaptation.rank)]


def _importances(source: Checkpoint) -> list[float]:
    """Return the normalised coarse importance of every block, from the plan."""
    path = source.directory / PLAN_FILE
    blocks = int(source.architecture.block_count)
    if not path.is_file():
        raise RecoveryError(
            f"{source.label} was not pruned by cfsp: it has no {PLAN_FILE} with the importance of "
            "its blocks; recover it with --rank-allocation uniform"
        )
    # Attentions of a stock model are not opened, those of others are.
    plan = PruningPlan.load(path).only("ffn")
    expected = [unit.block for unit in source.architecture.of_part("ffn").units]
    planned = [plan.index_of_block(unit.block) for unit in plan.kept_units]
    if planned != expected:
        raise PlanError(
            f"{path} describes {len(planned)} FFNs, the model has {len(expected)} in {blocks} "
            "blocks; recover it with --rank-allocation uniform"
        )
    importance_of = {plan.index_of_block(unit.block): unit.importance for unit in plan.kept_units}
    # Of blocks without an FFN nothing was removed, and no importance is known.
    mean = fmean(importance_of.values())
    return [importance_of.get(block, mean) for block in range(blocks)]


def allocate_ranks(weight_L: Sequence[float], mean_rank: float) -> list[int]:
    """Return ranks in proportion to positive weights, each at least 1, with a mean."""
    blocks, total = len(weight_L), round(mean_rank * len(weight_L))
    # Where remainders are equal the first gets the rank: the most important is the first.
    order = sorted(range(blocks), key=lambda block: -weight_L[block])
    most, ones = [total] * blocks, [1] * blocks
    # Blocks that would get less than 1 get exactly 1, the others share what is left.
    share_L = water_fill([weight_L[block] for block in order], most, ones, total, ones)
    rank_L = round_widths(share_L, most, ones, ones, total)
    return [rank for _, rank in sorted(zip(order, rank_L, strict=True))]


def load_to_train(
    source: Checkpoint, device: torch.device, dtype: str, *, stays_on_cpu: bool
) -> PreTrainedModel:
    """Load a model in its `training_dtype`.

    It has no dropout, whatever its config says: what one pass wins back is less than that costs.
    How evenly experts are used, which some configs add to the loss, is no part of what is won back.
    """
    model = load(source.directory, dtype=training_dtype(source, device, dtype))
    _leave_out_dropout(model)
    for config in (model.config, text_config_of(model.config)):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
    return model if stays_on_cpu else model.to(device)


def training_dtype(source: Checkpoint, device: torch.device, dtype: str) -> torch.dtype:
    """Return what a model is trained in: never float16, in which gradients overflow."""
    found = compute_dtype(source, dtype, device)
    return torch.float32 if found == torch.float16 else found


def _leave_out_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Of many models it is a number, such as `attention_dropout` or `layerdrop`; Falcon reads it
        # from its config in every step.
        config = getattr(module, "config", None)
        for each in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            values = vars(each)
            of_dropout = [n for n, value in values.items() if "drop" in n and type(value) is float]
            values.update(dict.fromkeys(of_dropout, 0.0))


def attach(
    model: PreTrainedModel,
    architecture: Architecture,
    names: Sequence[str],
    rank_L: Sequence[int | None],
) -> nn.Module:
    """Make parameters trainable; return what to train: a PEFT model, or the same without ranks.

    Trained tensors are float32 whatever the model is: updates are smaller than bfloat16 resolves.
    The plain model is changed in place.
    """
    model.requires_grad_(False)
    rank_of = {
        rf"{re.escape(architecture.blocks)}\.{index}\..*": rank
        for index, rank in enumerate(rank_L)
        if rank is not None
    }
    if not rank_of:
        for parameter in map(model.get_parameter, names):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return cast(nn.Module, model)
    import peft

    largest = max(rank_of.values())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=largest,
        lora_alpha=SCALE * largest,
        target_modules=[name.removesuffix(".weight") for name in names],
        rank_pattern=rank_of,
        alpha_pattern={pattern: SCALE * rank for pattern, rank in rank_of.items()},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings(), _names_as_they_are():
        # PEFT asks transformers for an attribute whose name is going away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return cast(nn.Module, peft.get_peft_model(model, config))


def size_of_weights(model: PreTrainedModel, names: Sequence[str]) -> float:
    """Return the root mean square of the matrices among these parameters."""
    # Biases have sizes of their own.
    matrices = [each.detach() for each in map(model.get_parameter, names) if each.ndim > 1]
    squares = sum(float(each.float().square().sum()) for each in matrices)
    return math.sqrt(squares / sum(each.numel() for each in matrices))


def merge(model: nn.Module) -> PreTrainedModel:
    """Return the plain model with its adapters merged into its weights."""
    unload: Any = getattr(model, "merge_and_unload", None)
    merged: PreTrainedModel = unload(safe_merge=True) if unload is not None else model
    merged.requires_grad_(False)
    return merged


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
