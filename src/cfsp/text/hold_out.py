"""The one rule for which calibration windows repair is judged by instead of fitted to.

Shapes: N windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HELD_OUT_WINDOWS = 4
_LEAST_STRIDE = 8


def is_held_out(parts: Sequence[int]) -> Tensor:
    """Return which windows are held out, as a mask [N].

    They are spread over all windows, about four of them and at most one of eight; a text that
    would have none holds out its last window, if it has two or more.

    Args:
        parts: windows of each text, in their order.
    """
    windows = sum(parts)
    stride = min(windows, max(_LEAST_STRIDE, math.ceil(windows / HELD_OUT_WINDOWS)))
    mask_N = torch.arange(windows) % stride == stride - 1
    end = 0
    for count in parts:
        start, end = end, end + count
        if count > 1 and not bool(mask_N[start:end].any()):
            mask_N[end - 1] = True
    return mask_N
