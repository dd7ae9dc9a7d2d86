from __future__ import annotations

import json

import pytest
from cfsp.architecture.catalogue import Family, installed_families, why_not

from cfsp.architecture import catalogue
from cfsp.cli import main


def test_the_command_lists_what_transformers_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "type", "class"]
    assert len(rows) == len(installed_families()) > 200
    assert ["llama", "LlamaForCausalLM"] in [row.split() for row in rows]


def test_what_is_not_proved_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["families"]
    assert {
        "model_type": "gemma3",
        "class": "Gemma3ForConditionalGeneration",
        "proved": None,
        "reason": None,
    } in listed


def test_named_types_are_proved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--prove", "qwen3_5", "bert", "--json"]) == 0
    bert, text, whole = json.loads(capsys.readouterr().out)["families"]
    assert (bert["model_type"], bert["proved"]) == ("bert", False)
    assert "is an encoder" in bert["reason"]
    assert (text["class"], text["proved"]) == ("Qwen3_5ForCausalLM", True)
    assert (whole["class"], whole["proved"]) == ("Qwen3_5ForConditionalGeneration", True)
    assert whole["reason"] is None

    assert main(["families", "--prove", "llama"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["llama", "LlamaForCausalLM", "yes"]


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--prove", "lama"]) == 2
    message = capsys.readouterr().err
    assert "no language model type 'lama'; did you mean llama?" in message


def test_a_type_that_crashes_or_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(Family("llama", "NoSuchClass")) == "its process ended with status 1"
    monkeypatch.setattr(catalogue, "TIME_LIMIT", 0.0)
    assert why_not(Family("llama", "LlamaForCausalLM")) == "no verdict after 0 seconds"
