"""`cfsp export`: its JSON, its sentences, and its list of targets."""

from __future__ import annotations

import json

from cfsp.checkpoint.output import remove_abandoned
from cfsp.cli.export import TARGETS
from cfsp.exports import registry
from ragged import cut
from tiny_models import build_tiny_model


def test_targets_are_those_of_the_registry():
    assert tuple(registry.TARGETS) == TARGETS


def test_json_people_and_python_are_told_the_same(tmp_path, tokenizer, command):
    source = str(cut(build_tiny_model("llama"), tokenizer, tmp_path).directory)
    argv = ["export", source, "--to", "vllm", "--out"]
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

    report = registry.export(source, "vllm", str(tmp_path / "d")).to_json()
    for own in ("out", "seconds", "serve"):
        del report[own], told[own]
    assert report == told


def test_what_a_killed_export_left_is_removed(tmp_path):
    gone = 2**22 + 1  # beyond the largest number of a process
    for ending in ("", ".full"):
        (tmp_path / f".a.gguf.partial-{gone}{ending}").write_text("half")
    remove_abandoned(tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
