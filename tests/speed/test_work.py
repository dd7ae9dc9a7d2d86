"""Work of decoders of any type: what a token passes, and where keys and values are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cfsp.checkpoint.reading import LoadedModel
from cfsp.cli.bench import _ratios
from cfsp.speed.bench import Speed
from cfsp.speed.work import Workload, experts_per_token, work_of
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model

WORKLOAD = Workload(batch=2, prompt=8, new_tokens=4)


def work(name: str) -> Any:
    return work_of(LoadedModel(tiny_model(name)), itemsize=4)


DENSE = ["gemma3_text", "gpt2", "llama", "mixtral", "opt", "phi3", "stablelm-parallel"]
OTHERS = ["aria_text", "deepseek_v3", "falcon", "glm4_moe", "gpt_oss", "qwen3_moe"]


@pytest.mark.parametrize("name", DENSE + OTHERS)
def test_prefill_work_is_what_torch_counts(name):
    model: Any = build_tiny_model(name) if name in DENSE else tiny_model(name)
    # Written out, attention is counted over all pairs; torch counts no grouped products.
    model.set_attn_implementation("eager")
    if LoadedModel(model).architecture.has_experts:
        model.set_experts_implementation("eager")
    found = work_of(LoadedModel(model), itemsize=4)
    tokens_BT = torch.zeros((WORKLOAD.batch, WORKLOAD.prompt), dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens_BT, logits_to_keep=1)
    pairs = WORKLOAD.batch * WORKLOAD.prompt**2
    causal = WORKLOAD.batch * WORKLOAD.prompt * (WORKLOAD.prompt + 1) / 2
    masked = 4 * found.attention_width * (pairs - causal)
    # The rotary frequencies are a matrix product too, far below one per cent.
    expected = pytest.approx(counter.get_total_flops(), rel=5e-3 if name in DENSE else 1e-2)
    assert found.prefill_flops(WORKLOAD) + masked == expected


def test_decode_work_is_all_weights_but_embeddings_and_the_cache():
    model: Any = build_tiny_model("llama", dtype=torch.bfloat16)
    found = work_of(LoadedModel(model), itemsize=2)
    weights = sum(
        p.numel() * 2 for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n
    )
    tokens_BT = torch.zeros((WORKLOAD.batch, WORKLOAD.prompt), dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=tokens_BT, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    one_step = Workload(WORKLOAD.batch, WORKLOAD.prompt - 1, 1)
    assert found.decode_bytes(one_step) == weights + held


@pytest.mark.parametrize(
    "name",
    ["deepseek_v3", "glm4_moe_lite", "falcon", "lfm2", "jamba", "qwen3_next", "bloom"],
)
def test_the_cache_is_that_of_blocks_with_attention(name):
    model: Any = tiny_model(name)
    tokens_BT = torch.zeros((WORKLOAD.batch, WORKLOAD.prompt), dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=tokens_BT, use_cache=True).past_key_values
    kept = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept += [layer.values for layer in cache.layers if getattr(layer, "values", None) is not None]
    held = sum(tensor.nbytes for tensor in kept)
    assert work(name).cache_bytes * WORKLOAD.batch * WORKLOAD.prompt == held


def test_what_nothing_says_is_unknown(monkeypatch):
    model: Any = tiny_model("mixtral")
    source = LoadedModel(model)
    assert work_of(source, itemsize=4).routed_share == 0.5
    monkeypatch.setattr("cfsp.speed.work.experts_per_token", lambda *_: math.nan)
    unknown = work_of(source, itemsize=4)
    assert math.isnan(unknown.prefill_flops(WORKLOAD))
    assert math.isnan(unknown.decode_bytes(WORKLOAD))
    speed = Speed(1, (1.0,), (1.0,), unknown.prefill_flops(WORKLOAD))
    assert json.loads(json.dumps(speed.to_json()))["ideal_ratio"] is None
    assert _ratios(speed)[2:] == ("unknown", "")
    assert _ratios(replace(speed, ideal_ratio=2.0))[2:] == ("2.000x", "50%")


def test_the_router_is_asked_before_the_config():
    model: Any = tiny_model("mixtral")
    source = LoadedModel(model)
    blocks, config = model.model.layers, SimpleNamespace(num_experts_per_tok=3)
    assert experts_per_token(config, blocks, source.units[0]) == 2
    for block in blocks:
        for module in block.modules():
            vars(module).pop("top_k", None)
    assert experts_per_token(config, blocks, source.units[0]) == 3
    # A number for each block.
    config.num_experts_per_tok = [2, 2, 2]
    assert math.isnan(experts_per_token(config, blocks, source.units[0]))
