"""The one way through all targets: what it tells, what is refused, that nothing is left behind."""

import json
import os

import pytest

from builders import need_openvino
from cfsp.checkpoint.output import _MACHINE, remove_abandoned
from cfsp.cli import export as export_command
from cfsp.errors import ExportError, OutputError, UsageError
from cfsp.exports import registry
from cfsp.exports.registry import export
from ragged import cut
from tiny_models import build_tiny_model


@pytest.fixture
def source(tmp_path, tokenizer):
    return cut(build_tiny_model("llama"), tokenizer, tmp_path)


def test_targets_are_those_of_the_registry():
    assert tuple(registry.TARGETS) == export_command.TARGETS


def test_json_people_and_python_are_told_the_same(source, tmp_path, command):
    argv = ["export", source.directory, "--to", "vllm", "--out"]
    out, err = command(*argv, tmp_path / "a", "--json")
    told = json.loads(out)
    assert told["target"] == "vllm"
    assert told["out"] == str(tmp_path / "a")
    assert told["verification"] is None
    assert "note: vLLM loads it with --trust-remote-code" in err

    written = tmp_path / "b"
    out = command(*argv, written).out
    assert "DeciLMForCausalLM, 3 blocks of 32 to 96 channels" in out
    assert "not verified" in out
    serve = f"vllm serve {written} --trust-remote-code"
    assert out.endswith(f"written to {written}\nserve it: {serve}\n")

    report = export(source.directory, "vllm", str(tmp_path / "d")).to_json()
    for own in ("out", "seconds", "serve"):
        del report[own], told[own]
    assert report == told


def test_what_a_killed_export_left_is_removed(tmp_path):
    gone = 2**22 + 1  # beyond the largest number of a process
    for ending in ("", ".full"):
        (tmp_path / f".a.gguf.partial-{_MACHINE}-{gone}{ending}").write_text("half")
    # Of another machine it may be at work still.
    elsewhere = tmp_path / f".a.gguf.partial-00000000-{gone}"
    elsewhere.write_text("half")
    remove_abandoned(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == [elsewhere]
    os.utime(elsewhere, (0, 0))
    remove_abandoned(tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_bad_requests(source, tmp_path):
    with pytest.raises(UsageError, match=r"unknown target 'sglang'; nobody has .* of gguf, vllm"):
        export(source.directory, "sglang", tmp_path / "x")
    with pytest.raises(UsageError, match="--pre-tokenizer belongs to gguf; openvino keeps"):
        export(source.directory, "openvino", tmp_path / "x", pre_tokenizer="qwen2")
    with pytest.raises(UsageError, match="--pre-tokenizer must be text, found 3"):
        export(source.directory, "gguf", tmp_path / "m.gguf", pre_tokenizer=3)
    with pytest.raises(UsageError, match=r"expected a name in \.gguf"):
        export(source.directory, "gguf", tmp_path / "m")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export(source.directory, "gguf", tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    pytest.importorskip("gguf")
    with pytest.raises(UsageError, match=r"unknown --type q9.*expected one of f32, f16"):
        export(source.directory, "gguf", tmp_path / "m.gguf", weight_type="q9")


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("nemotron_h", "gguf", "export of nemotron_h models is not supported.*own converter"),
        ("gpt_oss", "openvino", "export of gpt_oss models is not supported.*transformers runs"),
        ("gemma3", "openvino", "export of gemma3 models is not supported.*images too"),
        ("lfm2", "openvino", "export of lfm2 models is not supported: blocks of conv keep som"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(name, to, message, pruned_type, tmp_path):
    if to == "openvino":
        need_openvino()
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    with pytest.raises(ExportError, match=message):
        export(pruned_type(name), to, out)
    assert not list(tmp_path.iterdir())
