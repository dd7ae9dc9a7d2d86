"""Fine importance: each metric against a few lines of NumPy, and the channel sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_unit_statistics, random_weights
from cfsp.calibration.calibrate import UnitSums
from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.reading import LoadedModel
from cfsp.planning import importance
from cfsp.planning.importance import (
    FFNWeights,
    channel_scores,
    read_ffn_weights,
    strongest_channels,
    weight_norms,
)
from cfsp.settings import CHANNEL_METRICS, Criterion
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model


def numpy_scores(metric: str, statistics: UnitStatistics, weights: FFNWeights) -> np.ndarray:
    """The formulas of the module docstring, loop by loop, in float64."""
    X = np.sqrt(statistics.sum_of_squares_F.numpy())
    down = np.abs(weights.down_DF.double().numpy())
    inputs = [np.abs(w.double().numpy()) for w in (weights.up_FD, weights.gate_FD) if w is not None]
    F, D = len(X), down.shape[0]
    if metric == "activation":
        return X
    share = np.zeros(F)
    for j in range(D):
        share += down[j] * X / (down[j] * X).sum()
    for w in inputs:
        if metric == "eq8":
            # Within a channel: every channel's terms sum to one.
            share += np.array([(w[i] / w[i].sum()).sum() for i in range(F)])
        else:
            for j in range(D):
                share += w[:, j] / w[:, j].sum()
    return share * X


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("metric", CHANNEL_METRICS)
def test_scores_equal_numpy(metric, gate):
    statistics, weights = random_unit_statistics(24), random_weights(10, 24, gate=gate)
    expected = numpy_scores(metric, statistics, weights)
    scores_F = channel_scores(metric, statistics, weights)
    assert scores_F.dtype == torch.float32
    np.testing.assert_allclose(scores_F.numpy(), expected, rtol=2e-5)
    by_weights = np.linalg.norm(weights.down_DF.double().numpy(), axis=0)
    np.testing.assert_allclose(weight_norms(weights).numpy(), by_weights, rtol=2e-5)


@pytest.mark.parametrize("metric", CHANNEL_METRICS)
def test_dead_channels_and_rows_of_zeros_give_no_nan_and_go_first(metric):
    statistics, weights = random_unit_statistics(24), random_weights(10, 24)
    assert weights.gate_FD is not None
    statistics.sum_of_squares_F[5] = 0.0
    weights.down_DF[:, 5] = 0.0
    weights.down_DF[3] = 0.0
    weights.up_FD[:, 2] = 0.0
    scores_F = channel_scores(metric, statistics, weights)
    assert torch.isfinite(scores_F).all()
    assert 5 not in strongest_channels(scores_F, 23)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_strongest_channels_are_the_highest_scores(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    kept = strongest_channels(torch.tensor(scores, dtype=torch.float32), count)
    # Ties go to lower indices: a stable sort by falling score.
    expected = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
    assert kept == expected


def test_weights_are_read_from_the_model():
    model = build_tiny_model("llama")
    weights = read_ffn_weights(LoadedModel(model), 1)
    mlp = model.model.layers[1].mlp
    assert torch.equal(weights.down_DF, mlp.down_proj.weight)
    assert torch.equal(weights.up_FD, mlp.up_proj.weight)
    assert weights.gate_FD is not None
    assert torch.equal(weights.gate_FD, mlp.gate_proj.weight)


# The sums that the scores are made from.


def activations(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(5, 130, 12, generator=generator) * 3 + 0.5).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 5), (torch.float32, 2), (torch.bfloat16, 1)]
)
def test_channel_sums_equal_numpy_in_batches_of_any_size(dtype, batch):
    act_BTF = activations(dtype)
    before = act_BTF.clone()
    sums = UnitSums()
    for start in range(0, 5, batch):
        sums.add(act_BTF[start : start + batch])
    # What is given is what the down projection is about to read.
    assert torch.equal(act_BTF, before)
    exact = act_BTF.double().flatten(0, 1).numpy()
    assert sums.sum_of_squares_F is not None
    assert sums.sum_of_squares_F.dtype == torch.float64
    assert sum(sums.tokens_E) == 650
    np.testing.assert_allclose(sums.sum_of_squares_F.numpy(), (exact**2).sum(0), rtol=1e-6)
    statistics = UnitStatistics(0, sums.sum_of_squares_F, sum(sums.tokens_E))
    np.testing.assert_allclose(statistics.norm_F.numpy(), np.linalg.norm(exact, axis=0), rtol=1e-6)


def test_sums_of_many_tokens_keep_their_precision():
    """A float32 running sum would stall: 1 + 2^24 x 1 is not representable there."""
    sums = UnitSums()
    sums.add(torch.full((1, 1, 1), 4096.0))
    for _ in range(4):
        sums.add(torch.full((1, 256, 1), 1.0))
    assert sums.sum_of_squares_F is not None
    assert sums.sum_of_squares_F.item() == 4096.0**2 + 1024


def test_a_unit_that_keeps_all_is_not_scored(monkeypatch):
    source = LoadedModel(tiny_model("llama"), ("ffn", "kv"))
    monkeypatch.setattr(importance, "read_ffn_weights", lambda *_: pytest.fail("nothing to choose"))
    for index, unit in enumerate(source.units):
        observed = random_unit_statistics(unit.columns)
        kept = importance.choose_channels(source, index, observed, unit.width, Criterion())
        assert kept == tuple(range(unit.width))
