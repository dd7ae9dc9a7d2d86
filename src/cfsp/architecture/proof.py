"""The proof, by execution, that the units of a model are what discovery takes them for.

A small random model of the same class runs on a few tokens. One unit of every kind is proved, as
`cfsp.architecture.unit_proof` does, if none of its parameters is also used elsewhere, and if the
decoder calls each block once, in order, each on the output of the one before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.experts import with_experts
from cfsp.architecture.found import Architecture, Refusal, Unit
from cfsp.architecture.model_classes import build_model, model_class_of
from cfsp.architecture.small_run import FailedCheckError, SmallRun, run_small
from cfsp.architecture.unit_proof import prove_unit
from cfsp.errors import UnsupportedModelError
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, Part, unit_parts


@torch.no_grad()
def prove(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None = None,
    parts: tuple[Part, ...] = DEFAULT_PARTS,
) -> Architecture:
    """Return the blocks of a config's model and those of its units that can be cut.

    Units of `parts` must be there, and the blocks must run one by one: else it is an
    `UnsupportedModelError`. FFNs are found in any case.
    """
    model_class = model_class or model_class_of(config)
    proved = []
    for part in UNIT_PARTS:
        if part in (*unit_parts(parts), "ffn"):
            try:
                goes_whole = part == "kv" and "attention" in parts
                found = _prove_part(config, model_class, "attention" if goes_whole else part)
                proved.append(found)
            except UnsupportedModelError:
                # Where only blocks go, FFNs are what they are known by.
                if part != "ffn" or part in parts or not set(parts) & set(UNIT_PARTS):
                    raise
    # Attention comes before the FFN, or beside it.
    units = sorted(
        (unit for found in reversed(proved) for unit in found.units), key=lambda unit: unit.block
    )
    refused = tuple(refusal for found in proved for refusal in found.refused)
    architecture = replace(proved[0], units=tuple(units), refused=refused)
    if "experts" not in parts:
        return architecture
    return with_experts(architecture, config, small_run_of(config, model_class))


def _prove_part(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], part: Part
) -> Architecture:
    """Return the blocks and the units of one part that can be cut, or go (`attention`)."""
    architecture, shared = _guess(config, model_class, part)
    refused, alone = list(architecture.refused), []
    for number, unit in enumerate(architecture.units):
        names = [architecture.block_prefix(unit.block) + name for name in unit.axes]
        elsewhere = next((name for name in names if name in shared), None)
        if elsewhere is None:
            alone.append(number)
            continue
        reason = (
            f"alone: expected weights that are used nowhere else, found that {elsewhere} is "
            f"{shared[elsewhere]} too"
        )
        refused.append(Refusal(architecture.module_name(unit), reason))
    if not alone:
        raise _unsupported(architecture, refused, part)
    run = run_small(config, model_class, architecture, part)
    verdicts: dict[object, Unit | FailedCheckError] = {}
    units: list[Unit] = []
    for number in alone:
        unit, small = architecture.units[number], run.architecture.units[number]
        kind = unit.kind, _conduct(run.blocks[unit.block], small)
        if kind not in verdicts:
            verdicts[kind] = _verdict(run, small, part)
        verdict = verdicts[kind]
        if isinstance(verdict, FailedCheckError):
            refused.append(Refusal(architecture.module_name(unit), str(verdict)))
        else:
            fused = unit.whole() if verdict.is_whole else unit.as_fused_as(verdict)
            units.append(replace(fused, after=verdict.after, extras=verdict.extras))
    if not units:
        raise _unsupported(architecture, refused, part)
    return replace(architecture, units=tuple(units), refused=tuple(refused))


def _verdict(run: SmallRun, unit: Unit, part: Part) -> Unit | FailedCheckError:
    try:
        return prove_unit(run, unit, part)
    except FailedCheckError as failure:
        if part != "attention":
            return failure
    try:
        return prove_unit(run, unit.whole(), part)
    except FailedCheckError as failure:
        return failure


# Of one command, which asks about one set of blocks or experts after the other.
_small_runs: dict[str, SmallRun] = {}


def small_run_of(
    stock: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> SmallRun:
    """Return a small model of a stock config that ran once; the last one is kept."""
    key = f"{type(stock).__name__} {stock.to_json_string(use_diff=False)}"
    if key not in _small_runs:
        _small_runs.clear()
        model_class = model_class or model_class_of(stock)
        architecture, _ = _guess(stock, model_class, "ffn")
        _small_runs[key] = run_small(stock, model_class, architecture)
    return _small_runs[key]


def _conduct(block: nn.Module, unit: Unit) -> tuple[object, ...]:
    """Return what may make two units of a kind compute in different ways: types and numbers."""
    module = block.get_submodule(unit.path)
    return tuple(
        (type(part), *sorted((k, v) for k, v in vars(part).items() if may_matter(k, v)))
        for part in (block, *module.modules())
    )


def may_matter(name: str, value: object) -> bool:
    """Return whether an attribute of a module may change what it computes, by name and value."""
    is_plain = type(value) in (bool, int, float, str)
    return is_plain and not name.endswith(("idx", "index", "_id", "_number"))


def _unsupported(
    architecture: Architecture, refused: list[Refusal], part: Part
) -> UnsupportedModelError:
    name = architecture.class_name
    first = f"{refused[0].module} failed the check {refused[0].reason}" if refused else ""
    if part != "ffn":
        what = "lose KV groups" if part == "kv" else "go"
        return UnsupportedModelError(
            f"no attention of {name} can {what}: {first or 'none'}; prune it without the part "
            f"{part}"
        )
    if not refused:
        return UnsupportedModelError(
            f"{name} has no FFN in its {architecture.block_count} blocks {architecture.blocks} "
            "that cfsp could find; expected modules whose matrices lead from the hidden size to "
            "channels and back; if it has some, please report the model type"
        )
    return UnsupportedModelError(
        f"no FFN of {name} can be cut: {first}; please report the model type with this sentence"
    )


def _guess(
    config: PreTrainedConfig, model_class: Any, part: Part
) -> tuple[Architecture, dict[str, str]]:
    """Return what discovery finds, and for every shared parameter another name of it."""
    with torch.device("meta"):
        model = build_model(model_class, config, torch.float32)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: group[1] if name == group[0] else group[0]
        for group in names.values()
        if len(group) > 1
        for name in group
    }
    return find_architecture(model, part), shared
