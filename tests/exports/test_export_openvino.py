"""OpenVINO: the exported model decodes, step by step, what transformers decodes."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Llama4TextConfig

import cfsp
from builders import entries, need_openvino, raising
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError, OutputError, UsageError
from cfsp.exports.registry import ExportReport, export
from ragged import cut, half_of
from stock import logits_of
from tiny_models import build_tiny_model, dense_configs

need_openvino()


# Between them: rotary and learned positions, one matrix for two, transposed matrices, biases, tied
# embeddings, capped logits, and sliding windows in some blocks or in all. .ci/versions sets the
# variable.
DECODED = dense_configs("gemma2", "gpt2", "phi3")


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Gives a checkpoint of a type, the directory of its export, and the report."""

    def make(name: str) -> tuple[Checkpoint, Path, ExportReport]:
        directory = tmp_path_factory.mktemp(name)
        source = cut(build_tiny_model(name), tokenizer, directory)
        return source, directory / "ov", export(source.directory, "openvino", directory / "ov")

    return cache(make)


# Sliding windows of 16 and 8 tokens are left behind within the steps of the verification.
@pytest.mark.parametrize("name", DECODED)
def test_decodes_as_transformers_does(exported, name):
    source, out, report = exported(name)
    assert report.layout == "stateful OpenVINO model in f32"
    assert report.verification is not None
    assert report.verification.relative_error < 1e-5

    assert report.verification.max_difference < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == source.config.model_type
    assert "auto_map" not in config
    assert not list(out.glob("*.safetensors"))


def test_inputs_are_those_that_runtimes_expect(exported):
    _, out, _ = exported("phi3")
    import openvino

    model = openvino.Core().read_model(out / "openvino_model.xml")
    names = {port.get_any_name() for port in model.inputs}
    assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert [port.get_any_name() for port in model.outputs] == ["logits"]


def test_two_rows_and_padding(exported):
    source, out, _ = exported("phi3")
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(
        out / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    rows = [[5, 300, 7, 111], [9, 12]]
    found = compiled.create_infer_request().infer(
        {
            "input_ids": np.array([rows[0], [0, 0, *rows[1]]]),
            "attention_mask": np.array([[1, 1, 1, 1], [0, 0, 1, 1]]),
            "position_ids": np.array([[0, 1, 2, 3], [0, 0, 0, 1]]),
            "beam_idx": np.array([0, 1], dtype=np.int32),
        }
    )["logits"]
    reference = cfsp.load(source.directory)
    for row, logits in zip(rows, found, strict=True):
        expected_TV = logits_of(reference, torch.tensor([row]))[0]
        difference = torch.from_numpy(logits[-len(row) :]) - expected_TV
        assert float(difference.abs().max()) < 1e-4


def test_half_precision(tmp_path, tokenizer, monkeypatch, noted):
    """And OpenVINO, which reports to Google Analytics what it converts, reports nothing."""
    from openvino_telemetry.utils.sender import TelemetrySender

    reported = noted(TelemetrySender, "send", lambda *what: what)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = cut(build_tiny_model("llama", dtype=torch.bfloat16), tokenizer, tmp_path)
    report = export(source.directory, "openvino", tmp_path / "ov")
    assert report.layout == "stateful OpenVINO model in f16"
    assert not reported
    assert "intel" not in entries(tmp_path)
    assert "CI" not in os.environ
    with pytest.raises(UsageError, match="unknown --type q8_0 for openvino; expected f32 or f16"):
        export(source.directory, "openvino", tmp_path / "no", weight_type="q8_0")
    full = RuntimeError("basic_ios::clear: iostream error")
    monkeypatch.setattr("openvino.save_model", raising(full))
    with pytest.raises(OutputError, match=r"cannot write .*no: basic_ios::clear.*make room there"):
        export(source.directory, "openvino", tmp_path / "no")
    assert "no" not in entries(tmp_path)


def test_what_it_cannot_trace_is_refused(tokenizer, tmp_path, monkeypatch):
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    broken = RuntimeError("no such operator\nand a long trace")
    monkeypatch.setattr("openvino.convert_model", raising(broken))
    message = "cannot trace LlamaForCausalLM: RuntimeError: no such operator; use --to gguf or --to"
    with pytest.raises(ExportError, match=f"{message} vllm$"):
        export(source.directory, "openvino", tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


@pytest.mark.parametrize(
    ("rope", "groups", "message"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, None, r"by the length of the text \(dynamic\)"),
        ({}, (2, 1, 2), "differ in KV groups; use --to gguf$"),
    ],
    ids=["positions", "KV groups"],
)
def test_what_it_cannot_express_is_refused(tokenizer, tmp_path, rope, groups, message):
    model = build_tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    source = cut(model, tokenizer, tmp_path, groups=groups)
    with pytest.raises(ExportError, match=message):
        export(source.directory, "openvino", tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


@pytest.mark.parametrize("kind", ["llama4_text", "falcon"])
def test_attention_within_chunks_or_of_its_own(tokenizer, tmp_path, kind):
    """Three chunks are in the probe, and one token more; Falcon adds to scores by position."""
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    config = FalconConfig(**size, num_attention_heads=4, alibi=True)
    if kind == "llama4_text":
        config = Llama4TextConfig(
            **size, intermediate_size_mlp=64, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, moe_layers=[], attention_chunk_size=7,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    report = export(tmp_path / "dense", "openvino", tmp_path / "ov")
    assert report.verification is not None
    assert report.verification.relative_error < 1e-5


@pytest.mark.real
@pytest.mark.skipif("CFSP_EVERY_FAMILY" not in os.environ, reason="make versions runs it")
def test_the_real_model(tmp_path, demo):
    source = half_of(demo, tmp_path / "half")
    report = export(source.directory, "openvino", tmp_path / "ov", weight_type="f32")
    assert report.verification is not None
    assert report.verification.max_difference < 1e-3
