"""What is held out of a text: the windows that repair is judged by, the documents that recovery is.

Both are of every text, of every kind of the mixed one, and spread over it.

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
    would have none holds out its last window, if it has two or more. `parts` says how many windows
    each text has, in their order.
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


def held_out_documents(sizes: Sequence[int], least: int) -> list[bool]:
    """Return which documents are held out: the last one, and more at equal distances before it.

    Args:
        sizes: tokens of each document of a text, in their order.
        least: tokens to hold out; there are at most those of one document more.
    """
    total, seen, held = sum(sizes), 0, 0
    chosen: list[bool] = []
    for size in reversed(sizes):
        seen += size
        chosen.append(held * total < least * seen)
        held += size * chosen[-1]
    return chosen[::-1]
