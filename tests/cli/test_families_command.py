from __future__ import annotations

import json
from pathlib import Path

import pytest

from cfsp.cli import main
from cfsp.cli.families import COLUMNS
from cfsp.families import trial
from cfsp.families.catalogue import Family, installed_families
from cfsp.families.contract import Contract
from cfsp.families.trial import contract_of, why_not

LLAMA = Family("llama", "LlamaForCausalLM")
PARTS_OF_DENSE = ("kv", "attention", "blocks")


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
        "contract": None,
        "contract_notes": {},
        **dict.fromkeys(COLUMNS),
        **dict.fromkeys(f"{part}_reason" for part in COLUMNS),
    } in listed


def test_named_types_are_proved_and_their_checkpoints_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families", "--prove", "qwen3_5", "bert", "--json"]) == 0
    bert, text, whole = json.loads(capsys.readouterr().out)["families"]
    assert (bert["model_type"], bert["proved"], bert["contract"]) == ("bert", False, None)
    assert "is an encoder" in bert["reason"]
    for row, name in ((text, "Qwen3_5ForCausalLM"), (whole, "Qwen3_5ForConditionalGeneration")):
        assert (row["class"], row["proved"], row["contract"]) == (name, True, "passed")
        assert (row["reason"], row["contract_notes"]) == (None, {})
        assert all((row[part], row[f"{part}_reason"]) == (True, None) for part in PARTS_OF_DENSE)
        assert not row["experts"]
        assert "has no routed experts" in row["experts_reason"]
    assert not any(bert[part] for part in COLUMNS)


def test_the_table_says_why_no_tiny_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    # Their default models have few blocks, so that both take seconds.
    assert main(["families", "--prove", "blip-2", "nemotron_h"]) == 0
    *_, image, text = capsys.readouterr().out.splitlines()
    parts = ["yes", "no", "yes", "yes"]
    assert text.split()[:8] == ["nemotron_h", "NemotronHForCausalLM", "yes", "passed", *parts]
    assert "tiny model: TypeError" in image and "not run" in image


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--prove", "lama"]) == 2
    message = capsys.readouterr().err
    assert "no language model type 'lama'; did you mean llama?" in message


def test_a_type_that_crashes_or_never_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = Family("llama", "NoSuchClass")
    (reason,) = set(why_not(nothing).values())
    assert "no config could be made (AttributeError" in str(reason)
    monkeypatch.setattr(trial, "PROOF_LIMIT", 0.0)
    assert set(why_not(LLAMA).values()) == {"no verdict after 0 seconds"}
    monkeypatch.setattr(trial, "CONTRACT_LIMIT", 0.0)
    assert contract_of(LLAMA, tmp_path) == Contract(
        "failed", {"pruned": "no verdict after 0 seconds"}
    )
    monkeypatch.setattr(trial, "CONTRACT_LIMIT", 1.0)
    monkeypatch.setattr(trial, "begin_contract", never_end)
    assert contract_of(LLAMA, tmp_path) == Contract(
        "failed", {"pruned": "no verdict after 1 seconds"}
    )
    monkeypatch.setattr(trial, "CONTRACT_LIMIT", 60.0)
    monkeypatch.setattr(trial, "begin_contract", crash)
    assert contract_of(LLAMA, tmp_path) == Contract(
        "failed", {"pruned": "its process ended with status 3"}
    )


def never_end(family: Family, place: Path) -> None:
    while True:
        pass


def crash(family: Family, place: Path) -> None:
    raise SystemExit(3)


def test_parts_are_tried_by_themselves() -> None:
    # Its norms are over all heads.
    reasons = why_not(Family("olmoe", "OlmoeForCausalLM"))
    assert "failed the check cut" in str(reasons.pop("kv"))
    assert reasons == dict.fromkeys(("ffn", "attention", "experts", "blocks"))
