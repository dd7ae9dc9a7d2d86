"""The benchmarks of large models and of a GPU, on the CPU and on small shapes with few blocks."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import gpu
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.tensor_file import INDEX_FILE
from cfsp.text.tokenizers import load_tokenizer
from make_checkpoint import SHAPES, config_of, make_checkpoint
from scale import measure, sizes_of

SHAPE = "smollm2-135m"
# Parameters as published by the models' makers.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_the_published_number_of_parameters(name):
    def parameters(blocks):
        model = empty_model(config_of(name, blocks))
        model.tie_weights()
        return sum(parameter.numel() for parameter in model.parameters())

    first, second = parameters(1), parameters(2)
    more = SHAPES[name]["num_hidden_layers"] - 1
    assert first + more * (second - first) == PUBLISHED[name]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scale") / "dense"
    nbytes = make_checkpoint(out, SHAPE, blocks=2, shard_gigabytes=0.06)
    assert nbytes == sum(spec.nbytes for spec in Checkpoint(out).specs.values())
    return out


def test_the_checkpoint_has_the_true_shape(dense):
    source = Checkpoint(dense)
    assert (dense / INDEX_FILE).is_file()
    assert len(list(dense.glob("*.safetensors"))) > 1
    assert {spec.dtype for spec in source.specs.values()} == {torch.bfloat16}
    assert source.specs["model.layers.1.mlp.down_proj.weight"].shape == (576, 1536)
    assert source.specs["model.embed_tokens.weight"].shape == (49152, 576)
    assert "lm_head.weight" not in source.specs
    block = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
    assert sizes_of(source) == {"block": block, "embeddings": 2 * (49152 * 576 + 576)}
    weight = source.read("model.layers.1.mlp.down_proj.weight").float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(weight, source.read("model.layers.0.mlp.down_proj.weight").float())
    assert bool((source.read("model.norm.weight") == 1).all())


def test_its_tokenizer_gives_bytes(dense):
    tokenizer = load_tokenizer(dense)
    ids = tokenizer("Bytes, ünd more.", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("Bytes, ünd more.".encode())
    assert max(ids) < 258
    assert tokenizer.decode(ids) == "Bytes, ünd more."


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads /proc")
def test_pruning_is_measured_and_keeps_the_promise(dense, tmp_path):
    args = Namespace(
        directory=tmp_path, data="python-docs", seqlen=64, repair="ridge", memory_budget="1KB"
    )
    run = measure(args, dense, windows=3)
    assert run.blocks == 2
    assert run.tokens == 192
    assert run.hidden_bytes == 192 * 576 * 2
    assert set(run.report["passes"]) == {"coarse pass", "ridge"}
    assert 200e6 < run.peak < run.limit
    # The weights are read, and more than half of them written.
    weights = sum(spec.nbytes for spec in Checkpoint(dense).specs.values())
    assert run.io["rchar"] > weights
    assert run.io["wchar"] > weights / 2
    assert not list(tmp_path.iterdir())


# The stages of the benchmark for a GPU.


@pytest.mark.usefixtures("models_start_quickly")
def test_all_stages_run(tmp_path, capsys, monkeypatch):
    tiny = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 258}
    monkeypatch.setitem(SHAPES, gpu.TINY.shape, SHAPES[gpu.TINY.shape] | tiny)
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--directory", str(tmp_path), "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json"}
    stages = found["stages"]
    repairs = ["ridge 20%", "ridge 50%", "sequential 50%"]
    assert list(stages) == ["checkpoint", "calibrate", *repairs, "speed"]
    assert all(stage["seconds"] > 0 for stage in stages.values())
    passes = set(stages["sequential 50%"]["result"]["passes"])
    assert passes == {"coarse pass", "ridge", "sequential"}
    dense, pruned = stages["speed"]["result"]["models"]
    assert pruned["model"] == "50"
    assert pruned["parameters"] < dense["parameters"]
    assert pruned["workloads"][0]["decode"]["ideal_ratio"] > 1


def test_what_does_not_begin_in_time_is_left_out(tmp_path, capsys):
    gpu.main(["--tiny", "--directory", str(tmp_path), "--limit", "-1"])
    assert set(json.loads(capsys.readouterr().out)["stages"].values()) == {None}
