"""`cfsp export`: its JSON, its sentences, and its list of targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.cli.export import TARGETS
from cfsp.errors import OutputError
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
    assert main(["export", source, "--to", "vllm", "--out", str(tmp_path / "a"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["target"] == "vllm"
    assert report["out"] == str(tmp_path / "a")
    assert report["verification"]["max_difference"] == 0.0
    assert report["verification"]["tokens"] == 24
    assert "note: vLLM loads it with --trust-remote-code" in err

    assert main(["export", source, "--to", "vllm", "--out", str(tmp_path / "b")]) == 0
    out, _ = capsys.readouterr()
    assert "DeciLMForCausalLM, 3 blocks of 32 to 96 channels" in out
    assert "logits over 24 tokens differ by at most 0 " in out
    written = tmp_path / "b"
    command = f"vllm serve {written} --trust-remote-code"
    assert out.endswith(f"written to {written}\nserve it: {command}\n")

    argv = ["export", source, "--to", "vllm", "--out", str(tmp_path / "c"), "--no-verify"]
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


def test_python_says_and_refuses_the_same(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(cut(build_tiny_model("llama"), tokenizer, tmp_path).directory)
    report = registry.export(source, "vllm", str(tmp_path / "a"), verify=False)
    argv = ["export", source, "--to", "vllm", "--no-verify", "--json"]
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "b")]) == 0
    told = json.loads(capsys.readouterr().out)
    own = {"out", "seconds", "serve"}
    assert {k: v for k, v in report.to_json().items() if k not in own} == {
        k: v for k, v in told.items() if k not in own
    }
    before = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match="a exists and is not empty"):
        registry.export(source, "vllm", tmp_path / "a", verify=False)
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == before


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    from cfsp.checkpoint.output import remove_abandoned

    gone = 2**22 + 1  # beyond the largest number of a process
    for ending in ("", ".full"):
        (tmp_path / f".a.gguf.partial-{gone}{ending}").write_text("half")
    remove_abandoned(tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
