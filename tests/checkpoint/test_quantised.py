"""Quantised checkpoints are seen, pruned and loaded as the plain ones that they stand for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from any_models import tiny_model
from cfsp.checkpoint.reading import Checkpoint, fingerprint
from cfsp.errors import CheckpointError
from quantised_models import WAYS, quantise

SETTINGS: dict[str, Any] = {"sparsity": 0.25, "samples": 4, "seqlen": 32, "device": "cpu"}


@dataclass(frozen=True)
class Pair:
    quantised: Path
    plain: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Pair]:
    """Give, for every way to quantise, a quantised checkpoint and the plain one."""
    made = {}
    for name, way in WAYS.items():
        place = tmp_path_factory.mktemp("quantised")
        tiny_model(way.model).to(torch.bfloat16).save_pretrained(place / "plain")
        tokenizer.save_pretrained(place / "plain")
        quantise(place / "plain", place / "quantised", way)
        made[name] = Pair(place / "quantised", place / "plain")
    return made


@pytest.mark.parametrize("name", WAYS)
def test_it_reads_like_the_plain_checkpoint(pairs: dict[str, Pair], name: str) -> None:
    found, expected = Checkpoint(pairs[name].quantised), Checkpoint(pairs[name].plain)
    assert found.specs == expected.specs
    for tensor in expected.specs:
        assert torch.equal(found.read(tensor), expected.read(tensor)), tensor
        for count in (1, 70, 10**9):
            prefix = expected.read_prefix(tensor, count)
            assert torch.equal(found.read_prefix(tensor, count), prefix), tensor
        written = (b"".join(map(bytes, source.chunks(tensor))) for source in (found, expected))
        assert len(set(written)) == 1, tensor
    assert fingerprint(found) == fingerprint(expected)
    assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize("name", WAYS)
def test_it_is_pruned_like_the_plain_checkpoint(
    pairs: dict[str, Pair], name: str, text_file: Path, tmp_path: Path
) -> None:
    directories = {}
    for kind, source in (("found", pairs[name].quantised), ("expected", pairs[name].plain)):
        directories[kind] = tmp_path / kind
        cfsp.prune(source, out=tmp_path / kind, data=[str(text_file)], **SETTINGS)
    found, expected = (load_file(d / "model.safetensors") for d in directories.values())
    assert found.keys() == expected.keys()
    for tensor in expected:
        bits = [weights[tensor].view(torch.uint8) for weights in (found, expected)]
        assert torch.equal(*bits), tensor
    configs = [json.loads((d / "config.json").read_text()) for d in directories.values()]
    assert configs[0] == configs[1]
    assert configs[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", WAYS)
def test_it_loads_like_the_plain_checkpoint(pairs: dict[str, Pair], name: str) -> None:
    found, expected = cfsp.load(pairs[name].quantised), cfsp.load(pairs[name].plain)
    assert type(found) is type(expected)
    assert not found.training
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items())
    ids = torch.arange(12)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
