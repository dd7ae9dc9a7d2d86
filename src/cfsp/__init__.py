"""CFSP: structured pruning that makes a decoder-only LLM physically smaller and faster.

    import cfsp

    report = cfsp.prune("path/to/model", sparsity=0.2, data=["text.txt"], out="smaller")
    cfsp.recover("smaller", out="recovered", data=["text.txt"], max_minutes=30)
    model = cfsp.load("recovered")

    smaller = cfsp.prune(model_in_memory, tokenizer, sparsity=0.2, data=["text.txt"])

Method: CFSP, arXiv 2409.13199. Importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfsp.api import calibrate as calibrate
    from cfsp.api import evaluate as evaluate
    from cfsp.api import plan as plan
    from cfsp.api import prune as prune
    from cfsp.calibration.statistics import Statistics as Statistics
    from cfsp.checkpoint.loading import load as load
    from cfsp.errors import CfspError as CfspError
    from cfsp.exports.registry import export as export
    from cfsp.planning.plan_file import PruningPlan as PruningPlan
    from cfsp.recovery.recover import recover as recover
    from cfsp.result.prune_report import PruneReport as PruneReport
    from cfsp.settings import MaxLossIncrease as MaxLossIncrease
    from cfsp.settings import TargetKVCache as TargetKVCache
    from cfsp.settings import TargetParameters as TargetParameters
    from cfsp.settings import TargetSpeedup as TargetSpeedup
    from cfsp.settings import Text as Text
    from cfsp.speed.bench import bench as bench

    __version__: str

_NAMES_OF = {
    "cfsp.api": ("calibrate", "evaluate", "plan", "prune"),
    "cfsp.calibration.statistics": ("Statistics",),
    "cfsp.checkpoint.loading": ("load",),
    "cfsp.errors": ("CfspError",),
    "cfsp.exports.registry": ("export",),
    "cfsp.planning.plan_file": ("PruningPlan",),
    "cfsp.recovery.recover": ("recover",),
    "cfsp.result.prune_report": ("PruneReport",),
    "cfsp.settings.budget": (
        "MaxLossIncrease", "TargetKVCache", "TargetParameters", "TargetSpeedup",
    ),
    "cfsp.settings.text": ("Text",),
    "cfsp.speed.bench": ("bench",),
}  # fmt: skip
_HOME = {name: home for home, names in _NAMES_OF.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cfsp-llm")
    if name not in _HOME:
        raise AttributeError(f"module 'cfsp' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
