"""Sensitivity of blocks of any form: resumed where that is possible, else from the beginning."""

from __future__ import annotations

import pytest
import torch

from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.selection.divergence import dense_predictions
from cfsp.selection.masks import masked_channels
from cfsp.selection.sensitivity import block_sensitivities
from cfsp.streaming.stand_in import resumed_at
from tiny_decoders import tiny_model


# Blocks that return tuples, keys and values from an earlier block, several FFNs, blocks without.
@pytest.mark.parametrize(
    "name", ["falcon", "bloom", "gemma3n_text", "qwen3_next", "nemotron_h", "gemma3"]
)
def test_each_block_is_masked_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    source = LoadedModel(model)
    tokens_NT = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    kept_U = [tuple(range(0, unit.width * unit.ffns, 2)) for unit in source.units]
    starts: list[int] = []

    def noted(blocks: object, first: int, *rest: object) -> object:
        starts.append(first)
        return resumed_at(blocks, first, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("cfsp.selection.sensitivity.resumed_at", noted)
    found_L = block_sensitivities(source, model, tokens_NT, kept_U)["ffn"]
    count = len(blocks_of(model, source.architecture))
    with_units = sorted({unit.block for unit in source.units})
    for block in range(count):
        kept = {
            index: kept_U[index] for index, unit in enumerate(source.units) if unit.block == block
        }
        expected = 0.0
        with torch.inference_mode():
            for tokens_T in tokens_NT:
                dense = dense_predictions(model, tokens_T[None])
                with masked_channels(source, model, kept):
                    expected += dense.divergence(model) / len(tokens_NT)
        assert found_L[block] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert starts == 2 * ([0] * len(with_units) if name == "gemma3n_text" else with_units)
