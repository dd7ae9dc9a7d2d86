"""`cfsp export`: its JSON, its sentences, and its list of targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.cli.export import TARGETS
from cfsp.exports import registry
from ragged import cut
from tiny_models import build_tiny_model


def test_targets_are_those_of_the_registry() -> None:
    assert tuple(registry.TARGETS) == TARGETS


def test_json_and_people(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(cut(build_tiny_model("llama"), tokenizer, tmp_path).directory)
    capsys.readouterr()
    assert main(["export", source, "--to", "padded", "--out", str(tmp_path / "a"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["target"] == "padded"
    assert report["out"] == str(tmp_path / "a")
    assert report["verification"]["max_difference"] == 0.0
    assert report["verification"]["tokens"] == 24
    assert "note: 96 of 288 channels are zeros" in err

    assert main(["export", source, "--to", "vllm", "--out", str(tmp_path / "b")]) == 0
    out, _ = capsys.readouterr()
    assert "DeciLMForCausalLM, 3 blocks of 32 to 96 channels" in out
    assert "logits over 24 tokens differ by at most 0 " in out
    assert out.endswith(f"written to {tmp_path / 'b'}\n")

    argv = ["export", source, "--to", "padded", "--out", str(tmp_path / "c"), "--no-verify"]
    assert main(argv) == 0
    assert "not verified" in capsys.readouterr().out


def test_a_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(cut(build_tiny_model("qwen3"), tokenizer, tmp_path).directory)
    capsys.readouterr()
    assert main(["export", source, "--to", "vllm", "--out", str(tmp_path / "v")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cfsp export: vLLM's DeciLM class is a Llama")
    assert err.count("\n") == 1
