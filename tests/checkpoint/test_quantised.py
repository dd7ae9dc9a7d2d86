"""Quantised checkpoints are seen, pruned and loaded as the plain ones that they stand for."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, Mxfp4Config

import cfsp
from builders import changed, edit_json, read_json
from cfsp.checkpoint import quantisation
from cfsp.checkpoint.config_file import read_config, read_plain_fields
from cfsp.checkpoint.quantisation import quantisation_in
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.errors import CheckpointError
from cfsp.recovery.recover import copy_everything_else
from quantised_models import WAYS, Way, fp8_in_blocks, quantise
from tiny_decoders import tiny_model


class Pair(NamedTuple):
    quantised: Path
    plain: Path


def make_pair(way: Way, place: Path, tokenizer: Any) -> Pair:
    tiny_model(way.model).to(torch.bfloat16).save_pretrained(place / "plain")
    tokenizer.save_pretrained(place / "plain")
    quantise(place / "plain", place / "quantised", way)
    return Pair(place / "quantised", place / "plain")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer):
    """Give, for every way to quantise, a quantised checkpoint and the plain one."""
    return {
        name: make_pair(way, tmp_path_factory.mktemp("quantised"), tokenizer)
        for name, way in WAYS.items()
    }


@pytest.mark.parametrize("name", WAYS)
def test_it_reads_like_the_plain_checkpoint(pairs, name, monkeypatch):
    monkeypatch.setattr(quantisation, "_VALUES_AT_ONCE", 300)
    found, expected = map(Checkpoint, pairs[name])
    assert found.specs == expected.specs
    for tensor in expected.specs:
        assert torch.equal(found.read(tensor), expected.read(tensor)), tensor
        count = expected.specs[tensor].elements
        both = [source.stored.tensors[tensor] for source in (found, expected)]
        for part in ((0, 1), (0, count), (1, min(70, count)), (max(0, count - 7), count)):
            assert torch.equal(*(each.read_part(*part) for each in both)), tensor
        written = (b"".join(map(bytes, each.chunks())) for each in both)
        assert len(set(written)) == 1, tensor
    assert found.fingerprint == expected.fingerprint
    assert not hasattr(found.config, "quantization_config")


def test_it_is_pruned_like_the_plain_checkpoint(pairs, text_file, tmp_path, command):
    """What is read of the others is the same, so that they need not be pruned, too."""
    asked = ["--data", text_file, "--samples", 4, "--seqlen", 32, "--effort", "fast"]
    asked += ["--sparsity", 0.25]
    pair, out = pairs["fp8 experts"], [tmp_path / "found", tmp_path / "expected"]
    for source, target in zip(pair, out, strict=True):
        told = command("prune", source, "--out", target, *asked).out
        said = "dequantised from fp8 to bfloat16: larger per weight"
        assert (said in told) == (source == pair.quantised)
        card = (target / "README.md").read_text()
        assert ("stored quantised (fp8)" in card) == (source == pair.quantised)
    assert not changed(*out)
    configs = [(directory / "config.json").read_text() for directory in out]
    assert configs[0] == configs[1] and json.loads(configs[0])["dtype"] == "bfloat16"
    manifest = read_json(out[0] / "cfsp.json")
    assert manifest["dequantised"] == {"from": "fp8", "to": "bfloat16"}


# transformers wants whole blocks.
WHOLE_BLOCKS = Way(
    "deepseek_v3",
    {"quant_method": "fp8", "weight_block_size": [8, 8]},
    partial(fp8_in_blocks, block=(8, 8)),
)


@pytest.mark.parametrize(
    ("way", "config"),
    [
        (WHOLE_BLOCKS, FineGrainedFP8Config),
        (WAYS["fp8 per tensor"], FineGrainedFP8Config),
        (WAYS["mxfp8"], FineGrainedFP8Config),
        (WAYS["mxfp4"], Mxfp4Config),
    ],
)
def test_transformers_dequantises_to_the_same(way, config, tokenizer, tmp_path):
    pair = make_pair(way, tmp_path, tokenizer)
    expected = AutoModelForCausalLM.from_pretrained(
        pair.quantised, quantization_config=config(dequantize=True), dtype=torch.bfloat16
    )
    state, found = expected.state_dict(), cfsp.load(pair.quantised)
    assert type(found) is type(expected) and not found.training
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        # transformers gives the whole model one dtype.
        assert torch.equal(tensor.to(state[name].dtype), state[name]), name


def test_a_head_of_its_own_stays_whatever_the_config_says(tokenizer, tmp_path):
    pair = make_pair(WAYS["mxfp8"], tmp_path, tokenizer)
    for each in pair:
        edit_json(each / "config.json", lambda fields: fields.update(tie_word_embeddings=True))
    head, expected = (
        cfsp.load(each, dtype=torch.float32).get_output_embeddings().weight for each in pair
    )
    assert head.dtype == torch.float32 and torch.equal(head, expected)


def test_what_is_made_of_it_does_not_say_that_it_is_quantised(pairs, tmp_path, command):
    source = pairs["int-quantized"].quantised
    (source / "quantize_config.json").write_text("{}")
    command("export", source, "--to", "vllm", "--out", tmp_path / "exported")
    (tmp_path / "recovered").mkdir()
    copy_everything_else(Checkpoint(source), tmp_path / "recovered")
    for name in ("exported", "recovered"):
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        assert not (tmp_path / name / "quantize_config.json").exists()
    told = command("inspect", source).out
    assert "stored             as compressed-tensors; type and size are those dequantised" in told


def test_a_model_in_memory_that_is_quantised_is_refused(pairs):
    model = cfsp.load(pairs["mxfp8"].plain)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CheckpointError, match=r"is quantised.*load it with cfsp\.load"):
        LoadedModel(model)


def compressed(*weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    groups = {str(number): {"weights": each} for number, each in enumerate(weights)}
    changes |= {"config_groups": groups} if weights else {}
    return {**WAYS["int-quantized"].config, **changes}


INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit"),
        ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, "modelopt"),
        ("int8", "int8"),
        ({"quant_method": {}}, "{}"),
        (compressed(format="pack-quantized"), "compressed-tensors, pack-quantized"),
        (compressed(format="nvfp4-pack-quantized"), "compressed-tensors, nvfp4-pack-quantized"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "compressed-tensors, sparse"),
        (compressed(transform_config={"config_groups": {"R1": {}}}), "transformed"),
        (compressed({**INT8, "actorder": "group"}), "in groups by activation order"),
        (compressed({**INT8, "group_size": 0.5}), "in groups of 0.5"),
        (compressed(*({**INT8, "group_size": n} for n in (32, 64))), "in several ways at once"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "in blocks of 128"),
    ],
)
def test_other_ways_are_refused_by_name(config, named):
    with pytest.raises(CheckpointError) as caught:
        quantisation_in({"quantization_config": config}, "the model")
    message = str(caught.value)
    assert message.startswith("the model is quantised (") and "\n" not in message
    assert f"{named}), which cfsp cannot undo (it can: fp8, mxfp8, fbgemm_fp8, mxfp4, " in message
    assert "prune the model that it was made from and quantise the result, or, where" in message
    assert "call dequantize() and save_pretrained()" in message


def test_what_mlx_quantised_is_refused():
    """It writes its key, and for the hub the same as transformers' key, without a method."""
    given = {"group_size": 64, "bits": 4}
    for keys in (["quantization"], ["quantization", "quantization_config"]):
        with pytest.raises(CheckpointError, match=r"quantised \(a way that it .*, as MLX\), which"):
            quantisation_in(dict.fromkeys(keys, given), "the model")


def test_what_modelopt_quantised_is_refused_whatever_its_config_says(tmp_path):
    """As nvidia/Llama-3.1-8B-Instruct-FP8, whose config.json is that of the plain model."""
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(CheckpointError, match=r"quantised \(modelopt\), which cfsp cannot undo"):
        read_config(tmp_path)


UP, QUERIES = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{UP}_scale_inv"


def with_tensors(source: Path, target: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Return a copy in which tensors are others, or gone."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Any] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("fp8 in blocks", {SCALE: None}, f"lacks the tensor {SCALE}, the scale of"),
        (
            "fp8 in blocks",
            {SCALE: torch.ones(5, 5)},
            "up_proj.weight_scale_inv is float32 of shape [5, 5], expected one number",
        ),
        ("fp8 in blocks", {UP: torch.ones(96, 32)}, f"has {SCALE} beside {UP} in float32"),
        (
            "mxfp4",
            {QUERIES: torch.ones(64, 32).to(torch.int8)},
            "q_proj.weight is stored as int8; save the model in float32",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(pairs, tmp_path, name, changes, said):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(with_tensors(pairs[name].quantised, tmp_path / "model", changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_packed_weights_of_which_the_config_says_nothing_are_told(copied, tmp_path):
    """As of old GPTQ and AWQ models, which say it in quantize_config.json or quant_config.json."""
    packed = {UP: None, UP.replace("weight", "qweight"): torch.ones(4, 96).to(torch.int32)}
    with pytest.raises(CheckpointError, match=r"is quantised \(.*up_proj.qweight, as of GPTQ or A"):
        Checkpoint(with_tensors(copied, tmp_path / "packed", packed))


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_without_a_plain_dtype_in_the_config_weights_become_bfloat16(pairs, tmp_path, dtype):
    directory = Path(shutil.copytree(pairs["mxfp4"].quantised, tmp_path / "model"))
    edit_json(directory / "config.json", lambda fields: fields.update(dtype=dtype))
    name = "model.layers.0.mlp.experts.down_proj"
    assert Checkpoint(directory).specs[name].dtype == torch.bfloat16
    # transformers takes what a config says for the dtype of the whole model.
    assert read_plain_fields(directory).get("dtype") is None
    assert read_config(directory)[0].dtype is None
