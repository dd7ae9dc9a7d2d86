"""Coarse importance: how much each block matters, from how far it moves the hidden state.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from cfsp.calibration.accumulators import DISTANCES
from cfsp.calibration.statistics import Statistics
from cfsp.errors import UsageError

# Not a distance: widths follow from the scores of all channels (`cfsp.importance.competition`).
GLOBAL = "global"
BLOCK_METRICS = (*DISTANCES, "uniform", GLOBAL)

# The published code sums angular distances over 128 windows of 1024 tokens and divides by 1e4
# before the sigmoid. With means instead of sums that is this gain, at any calibration size.
SIGMOID_GAIN = 128 * 1024 / 1e4


def block_distances(statistics: Statistics, metric: str) -> list[float]:
    """Return the distance of every block by one metric, on the scale of angular distance.

    `cosine`, `euclidean`, `mse` and `mae` have other units than the angular distance that the
    sigmoid's gain was made for; they are scaled to its mean over the blocks. `uniform` gives
    every block the same distance. `global` needs none and gets the angular one, to be told.

    Raises:
        UsageError: the metric is unknown.
    """
    if metric not in BLOCK_METRICS:
        raise UsageError(f"unknown block metric {metric!r}; known are: {', '.join(BLOCK_METRICS)}")
    angular_L = statistics.distances("angular")
    if metric == "uniform":
        return [fmean(angular_L)] * len(angular_L)
    if metric in ("angular", GLOBAL):
        return angular_L
    distance_L = statistics.distances(metric)
    mean = fmean(distance_L)
    scale = fmean(angular_L) / mean if mean > 0 else 0.0
    return [distance * scale for distance in distance_L]


def block_importance(distance_L: Sequence[float]) -> list[float]:
    """Return the normalised importance of every block, in (0, 1).

        s_l = sigmoid(g * (d_l - mean d)),  g = 13.1072   (CFSP Eq. 4, published code)

    Args:
        distance_L: distances on the scale of angular distance.
    """
    mean = fmean(distance_L)
    return [_sigmoid(SIGMOID_GAIN * (distance - mean)) for distance in distance_L]


def _sigmoid(x: float) -> float:
    # Both branches keep the exponent negative: no overflow at any distance.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
