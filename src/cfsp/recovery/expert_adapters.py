"""Low-rank adapters of routed experts, which are parameters and not modules.

PEFT adapts a parameter as W + (alpha / r) B A with a B and an A for every expert. Whether it can
for a class is tried on a small random model of it: the adapted block computes what the merged one
does, and gradients reach the adapter.

PEFT also takes names such as `gate_proj` for matrices of experts in older versions of transformers
and trains the experts instead (https://github.com/huggingface/peft/issues/3711).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.small_run import SmallRun, run_small
from cfsp.checkpoint.config_widths import stock_config
from cfsp.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture, Unit
    from cfsp.recovery.settings import Method

_TOLERANCE = 1e-4
_RANK = 2


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
def names_as_they_are() -> Iterator[None]:
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


def misread_name(model: PreTrainedModel, names: list[str]) -> str | None:
    """Return an adapted module that PEFT will not find when it loads the adapter, if any."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return None
    import peft

    config = peft.LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # only some of what it takes for parts of one matrix
        return names[0]
    left = set(config.target_modules)
    return next((name for name in names if name not in left), None)
