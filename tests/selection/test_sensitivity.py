"""Sensitivity: one block masked at a time, from kept hidden states as from the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from builders import draw_windows
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import architecture_of, blocks_of
from cfsp.selection.divergence import POSITION_STRIDE, dense_predictions
from cfsp.selection.masks import masked_channels
from cfsp.selection.sensitivity import block_sensitivities, with_sensitivity
from cfsp.settings import Criterion
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.stand_in import hidden_states_entering, resumed_at
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, TINY_CONFIGS, VOCABULARY, WIDTH, build_tiny_model


def random_tokens(windows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (windows, 12), generator=generator)


def numpy_divergence(dense_BTV: torch.Tensor, changed_BTV: torch.Tensor) -> float:
    """KL(dense || changed) after every few tokens."""
    p, q = (np.exp(x[:, ::POSITION_STRIDE].double().numpy()) for x in (dense_BTV, changed_BTV))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_resumed_forward_is_the_whole_one(name: str) -> None:
    model, tokens_BT = build_tiny_model(name), random_tokens(2)
    blocks = blocks_of(model, architecture_of(model.config))
    originals = list(blocks)
    with torch.inference_mode():
        with hidden_states_entering(blocks) as entering_L:
            whole_BTV = model(tokens_BT, use_cache=False).logits
        assert len(entering_L) == BLOCKS
        for first in range(BLOCKS):
            with resumed_at(blocks, first, entering_L[first]):
                resumed_BTV = model(tokens_BT, use_cache=False).logits
            assert torch.equal(resumed_BTV, whole_BTV), first
    assert list(blocks) == originals
    assert not any(block._forward_pre_hooks for block in blocks)


def test_divergence_is_that_of_numpy() -> None:
    model, tokens_BT = build_tiny_model("llama"), random_tokens(2)
    with torch.inference_mode():
        dense_BTV = model(tokens_BT).logits
        dense = dense_predictions(model, tokens_BT)
        assert dense.divergence(model) == pytest.approx(0, abs=1e-6)
        with masked_channels(LoadedModel(model), model, {0: (1, 2, 3)}):
            changed_BTV = model(tokens_BT).logits
            found = dense.divergence(model)
    assert found == pytest.approx(numpy_divergence(dense_BTV, changed_BTV), rel=1e-4)
    assert found > 0.01


# Blocks that return tuples, keys and values from an earlier block, several FFNs, blocks without.
@pytest.mark.parametrize(
    "name", ["llama", "falcon", "bloom", "gemma3n_text", "qwen3_next", "nemotron_h", "gemma3"]
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

    monkeypatch.setattr("cfsp.selection.masks.resumed_at", noted)
    seen: list[None] = []
    found_L = block_sensitivities(source, model, tokens_NT, kept_U, lambda: seen.append(None))[
        "ffn"
    ]
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
    # From the first block on is the whole model.
    assert starts == 2 * [block for block in with_units if block and name != "gemma3n_text"]
    assert len(seen) == 2 * len(with_units)


def test_sensitivity_of_experts_is_measured() -> None:
    model, tokens_NT = build_tiny_model("mixtral"), random_tokens(1)
    every, half = tuple(range(4 * WIDTH)), tuple(range(0, 4 * WIDTH, 2))
    found_L = block_sensitivities(LoadedModel(model), model, tokens_NT, [every, half, every])["ffn"]
    assert found_L[0] == found_L[2] == pytest.approx(0, abs=1e-6)
    assert found_L[1] > 1e-3


def test_what_stayed_is_stored_by_part(text_file: Path, tokenizer: Any) -> None:
    config = TINY_CONFIGS["llama"]()
    config.update({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8})
    source = LoadedModel(AutoModelForCausalLM.from_config(config).eval(), ("ffn", "kv"))
    windows = draw_windows([str(text_file)], tokenizer, samples=2, seqlen=16)
    runtime = Runtime(torch.device("cpu"), torch.float32, 2)
    statistics = with_sensitivity(
        source, calibrate(source, windows, runtime), windows, Criterion(), runtime
    )
    of_ffns = statistics.sensitivity
    assert of_ffns is not None
    assert of_ffns.kept_L == (1 / 2,) * BLOCKS
    assert of_ffns.other_parts["kv"].kept_L == (2 / 3,) * BLOCKS
