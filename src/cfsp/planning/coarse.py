"""Coarse importance: how much each block matters, from how far it moves the hidden state.

Only blocks that have a unit count: the budget is spent there. Every FFN unit is as important as its
block. The same of attentions, by how far these move the hidden state where that is seen.

Shapes: L blocks that have a unit, in their order, U units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from cfsp.calibration.statistics import Statistics
from cfsp.errors import StatisticsError
from cfsp.planning.allocation import ModelSize
from cfsp.settings import ANGULAR, SENSITIVITY, UNIFORM, Part

# The published code sums angular distances over 128 windows of 1024 tokens and divides by 1e4
# before the sigmoid. With means instead of sums that is this gain, at any calibration size.
SIGMOID_GAIN = 128 * 1024 / 1e4

_LEAST_SHARE = 1e-3

# Angular distance settles with little text; study 7 (LOG.md) shows how little.
COARSE_WINDOWS = 8


def block_distances(statistics: Statistics, metric: str) -> list[float]:
    """Return the angular distance of every block with a unit; by `uniform` all have the mean."""
    distance_L = _of_blocks_with_units(statistics, statistics.distance_L)
    return [fmean(distance_L)] * len(distance_L) if metric == UNIFORM else distance_L


def block_importance(distance_L: Sequence[float]) -> list[float]:
    """Return the normalised importance of every block, in (0, 1), by distances d.

    s_l = sigmoid(g * (d_l - mean d)),  g = 13.1072   (CFSP Eq. 4, published code)
    """
    mean = fmean(distance_L)
    return [_sigmoid(SIGMOID_GAIN * (distance - mean)) for distance in distance_L]


def importance_by(statistics: Statistics, metric: str) -> list[float]:
    """Return the normalised importance of every block with a unit by one metric, in (0, 1].

    By sensitivity it is sqrt(KL_l) over the largest, where KL_l is what halving the block would
    cost. If removing a share 1 - k of a block costs KL_l (1/k - 1), widths in proportion to
    sqrt(KL_l) cost least: hence the root.
    """
    if metric != SENSITIVITY:
        return block_importance(block_distances(statistics, metric))
    if statistics.sensitivity is None:
        raise StatisticsError(
            f"the block metric {metric} needs the blocks' sensitivity, which these statistics do "
            "not have; make them with: cfsp calibrate --sensitivity"
        )
    halved_L = _of_blocks_with_units(statistics, statistics.sensitivity.halved_L)
    root_L = [math.sqrt(divergence) for divergence in halved_L]
    # A block that nothing depends on still counts a little: importance is positive.
    least = max(root_L) * _LEAST_SHARE or 1.0
    largest = max(*root_L, least)
    return [max(root, least) / largest for root in root_L]


def importance_of_units(
    statistics: Statistics, metric: str, size: ModelSize, spent: Sequence[Part]
) -> tuple[list[float], list[float]]:
    """Return the distance and the normalised importance of every unit.

    Widths in proportion to it share the cost between parts: by sensitivity, if removing a share
    1 - k of a unit costs KL (1/k - 1) and frees its P parameters by that share, what is cheapest
    is k in proportion to sqrt(KL / P). Distances of several parts are not comparable; each part
    then gives up about as large a share. What was not measured of parts that are not `spent`,
    which lose no channels, is not needed.
    """
    parts = list(dict.fromkeys(unit.part for unit in statistics.units))
    compared = metric == SENSITIVITY and len([part for part in parts if part in spent]) > 1
    distance_U, importance_U = ([0.0] * len(statistics.units) for _ in range(2))
    for part in parts:
        own = statistics.of_part(part)
        numbers = [index for index, unit in enumerate(statistics.units) if unit.part == part]
        distances = of_units(own, block_distances(own, metric))
        is_needed = part in spent or own.sensitivity is not None
        importances = of_units(own, importance_by(own, metric if is_needed else ANGULAR))
        if compared and own.sensitivity is not None:
            largest = max(_of_blocks_with_units(own, own.sensitivity.halved_L))
            each = fmean(size.units[i].width * size.units[i].channel_parameters for i in numbers)
            scale = math.sqrt(largest / each)
            importances = [importance * scale for importance in importances]
        for index, distance, importance in zip(numbers, distances, importances, strict=True):
            distance_U[index], importance_U[index] = distance, importance
    if compared:
        # Where nothing depends on anything, all count alike.
        largest = max(importance_U) or 1.0
        importance_U = [max(value / largest, _LEAST_SHARE**2) for value in importance_U]
    return distance_U, importance_U


def of_units(statistics: Statistics, value_L: Sequence[float]) -> list[float]:
    """Return for every unit what there is for its block."""
    value_of = dict(zip(statistics.blocks_with_units, value_L, strict=True))
    return [value_of[unit.block] for unit in statistics.units]


def _of_blocks_with_units(statistics: Statistics, values: Sequence[float]) -> list[float]:
    return [values[block] for block in statistics.blocks_with_units]


def _sigmoid(x: float) -> float:
    # Both branches keep the exponent negative: no overflow at any distance.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
