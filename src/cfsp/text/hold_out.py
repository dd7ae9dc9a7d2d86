"""The one rule for which calibration windows repair is judged by instead of fitted to.

Shapes: N windows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HELD_OUT_WINDOWS = 4
_LEAST_STRIDE = 8


def is_held_out(windows: int) -> Tensor:
    """Return which of so many windows are held out, as a mask [N].

    They are spread, so that every text of a mixture is held out in part.
    """
    stride = min(windows, max(_LEAST_STRIDE, math.ceil(windows / HELD_OUT_WINDOWS)))
    return torch.arange(windows) % stride == stride - 1
