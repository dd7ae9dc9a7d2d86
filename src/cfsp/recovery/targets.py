"""Which weights of a model are trained: matrices by module, routed experts by parameter.

Adapters of a block have a rank of their own (CFSP, Eq. 9: r_l proportional to s_l), or equal ones.

Shapes: L blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.skeleton import blocks_of, empty_model
from cfsp.errors import PlanError, RecoveryError, UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.recovery.adaptation import BlockTargets, why_experts_stay

if TYPE_CHECKING:
    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import Checkpoint
    from cfsp.recovery.settings import Adaptation

logger = logging.getLogger(__name__)
# GPT-2 keeps its matrices transposed, in a class of its own.
_MATRICES = (nn.Linear, Conv1D)


def targets_of(source: Checkpoint, adaptation: Adaptation) -> list[BlockTargets]:
    """Return what is trained in each block; it is known before a weight is read."""
    rank_L = ranks_of(source, adaptation)
    model, architecture = empty_model(source.config), source.architecture
    with_experts, reason = architecture.has_experts and adaptation.targets != "attention", None
    if with_experts:
        reason = why_experts_stay(source.config, architecture, adaptation.method)
    found = []
    for index, block in enumerate(blocks_of(model, architecture)):
        units, prefix = architecture.units_of(index), architecture.block_prefix(index)
        routed = [unit for unit in units if unit.routed and with_experts and reason is None]
        experts = dict.fromkeys(name for u in routed for name in (u.gate, u.up, u.down) if name)
        matrices = _matrices_of(block, units, adaptation)
        found.append(
            BlockTargets(
                tuple(prefix + name for name in matrices),
                tuple(prefix + name for name in experts),
                rank_L[index],
            )
        )
    if not any(block.matrices or block.experts for block in found):
        raise UsageError(
            f"the FFN of a {source.config.model_type} model is all experts, which cannot be "
            f"trained: {reason}; use --targets attention"
        )
    if reason is not None:
        logger.info(f"experts stay as they are, everything else is trained: {reason}")
    return found


def _matrices_of(block: nn.Module, units: Sequence[Unit], adaptation: Adaptation) -> list[str]:
    """Return the modules of a block, by their paths from it, that are trained."""
    names = [name for name, module in block.named_modules() if multiplies_by_its_matrix(module)]
    if adaptation.method != "full":
        names = [name for name in names if not _may_be_bypassed(block, name)]
    if adaptation.targets == "all":
        return names
    in_ffn = _in_ffn(names, [unit for unit in units if unit.part == "ffn"])
    return [name for name in names if (name in in_ffn) == (adaptation.targets == "mlp")]


def multiplies_by_its_matrix(module: nn.Module) -> bool:
    """Return whether a module's output is its input times its matrix, plus its bias if any.

    Of a class made from `nn.Linear` that is tried: some routers also choose, and some matrices
    are of groups.
    """
    if not isinstance(module, _MATRICES):
        return False
    if type(module) not in _tried:
        _tried[type(module)] = type(module) in _MATRICES or _is_linear(module)
    return _tried[type(module)]


_tried: dict[type[nn.Module], bool] = {}


def _is_linear(module: nn.Linear | Conv1D) -> bool:
    values = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    matrix, bias = values["weight"], values.get("bias")
    if isinstance(module, Conv1D):
        matrix = matrix.T
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


def _in_ffn(names: Sequence[str], units: Sequence[Unit]) -> set[str]:
    """Return the matrices of FFNs, and what lies beside these in the same module."""
    matrices = {name.removesuffix(".weight") for unit in units for name in unit.axes}
    modules = tuple(f"{unit.path.partition('.')[0]}." for unit in units if unit.path)
    return {name for name in names if name in matrices or name.startswith(modules)}


def ranks_of(source: Checkpoint, adaptation: Adaptation) -> list[int | None]:
    """Return the rank of every block's adapters; full training has none."""
    blocks, allocation = int(source.architecture.block_count), adaptation.allocation
    if adaptation.method == "full":
        return [None] * blocks
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
    total, poor = round(mean_rank * len(weight_L)), set[int]()
    while True:
        # Blocks that would get less than 1 get exactly 1, the others share what is left.
        weight = sum(value for block, value in enumerate(weight_L) if block not in poor)
        left = total - len(poor)
        share_L = [
            1.0 if block in poor else left * value / weight for block, value in enumerate(weight_L)
        ]
        newly_poor = {block for block, share in enumerate(share_L) if share < 1}
        if not newly_poor:
            break
        poor |= newly_poor
    # By largest remainder.
    rank_L = [int(share) for share in share_L]
    by_remainder = sorted(range(len(rank_L)), key=lambda b: (rank_L[b] - share_L[b], b))
    for block in by_remainder[: total - sum(rank_L)]:
        rank_L[block] += 1
    assert sum(rank_L) == total, (rank_L, total)
    return rank_L
