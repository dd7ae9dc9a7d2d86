"""The memory that training takes, and what can be trained with the memory that there is."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.engine.whole import free_bytes
from cfsp.recovery.settings import Method

if TYPE_CHECKING:
    import torch

    from cfsp.checkpoint.reading import WeightSource

# What training holds for each parameter: weights, gradients, AdamW's moments in float32. Adapters
# leave the weights in the model's dtype and have little else.
_BYTES_TO_TRAIN: dict[Method, int] = {"full": 16, "lora": 4}
_BYTES_OF_TEACHER = 4


def training_bytes(method: Method, parameters: int, parameters_of_teacher: int) -> int:
    """Return about what training with a teacher holds in memory."""
    return _BYTES_TO_TRAIN[method] * parameters + _BYTES_OF_TEACHER * parameters_of_teacher


def method_that_fits(dense: WeightSource, device: torch.device) -> Method | None:
    """Return how a model pruned from this one can be trained with this one as its teacher.

    All projections in full where there is memory for that, which recovers more in the same time;
    else adapters. Not even those: None.
    """
    parameters, available = parameter_count(dense), free_bytes(device)
    if training_bytes("full", parameters, parameters) <= available:
        return "full"
    has_adapters = importlib.util.find_spec("peft") is not None
    fits = training_bytes("lora", parameters, parameters) <= available
    return "lora" if fits and has_adapters else None
