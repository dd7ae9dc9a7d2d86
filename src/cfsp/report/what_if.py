"""What the slider computes with: the numbers that allocation needs, and energy curves.

The page does the allocation itself (`assets/what_if.js`), so that a reader can try any sparsity
without cfsp. A test compares its widths with `cfsp.planning.allocation`.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from typing import Any

from cfsp.report.channels import curve_step, energy_removed, removal_curve
from cfsp.report.run_facts import RunFacts
from cfsp.settings import MULTIPLE_OF_NARROW


def what_if_data(run: RunFacts) -> dict[str, Any] | None:
    """Return what the page needs to plan this run anew, as JSON types.

    None where plan or parameter counts are missing, or widths do not follow from importance.
    Without statistics there are no energy curves, and the page predicts no error.
    """
    plan, size = run.plan, run.size
    if plan is None or size is None:
        return None
    if False:
        return None
    multiple = int(plan.criterion.get("multiple", MULTIPLE_OF_NARROW))
    steps = [curve_step(block.width, multiple) for block in plan.blocks]
    curves = own = None
    if run.statistics is not None:
        pairs = zip(run.statistics.blocks, steps, strict=True)
        curves = [removal_curve(block, step) for block, step in pairs]
        both = zip(run.statistics.blocks, plan.blocks, strict=True)
        own = [energy_removed(statistics, block.kept) for statistics, block in both]
    of = str(plan.criterion.get("of", "ffn"))
    return {
        "name": run.name,
        "of": of,
        "sparsity": float(plan.criterion.get("sparsity", plan.ffn_sparsity)),
        "most": _most(of, multiple, size.width_L, size.channel_parameters_L[0], size.parameters),
        "multiple": multiple,
        "clamp": str(plan.criterion.get("clamp", "published")),
        "widths": list(size.width_L),
        "kept": plan.kept_widths,
        "importances": [block.importance for block in plan.blocks],
        "channelParameters": list(size.channel_parameters_L),
        "parameters": size.parameters,
        "steps": steps,
        "removed": curves,
        "channelMetric": str(plan.criterion.get("channel_metric")),
        "ownRemoved": own,
    }


def _most(
    of: str, multiple: int, width_L: tuple[int, ...], each: int, parameters: int
) -> float:  # fmt: skip
    """Return the largest sparsity that a plan can reach, rounded down to a percent."""
    total = sum(width_L)
    removable = total - sum(min(multiple, width) for width in width_L)
    highest = removable / total if of == "ffn" else removable * each / parameters
    return math.floor(100 * highest) / 100
