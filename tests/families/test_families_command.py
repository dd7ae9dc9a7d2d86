from __future__ import annotations

import json

import pytest

from cfsp.cli import main
from cfsp.cli.families import COLUMNS
from cfsp.families import trial
from cfsp.families.catalogue import Family, installed_families
from cfsp.families.trial import NoAnswerError, call_apart, why_not

LLAMA = Family("llama", "LlamaForCausalLM")
PARTS_OF_DENSE = ("kv", "attention", "blocks")


def test_the_command_lists_what_transformers_has_and_what_can_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["model", "type", "class", "FFN", "channels"]
    assert len(rows) == len(installed_families()) > 200
    llama = ["llama", "LlamaForCausalLM", "yes", "yes", "yes", "no", "yes"]
    assert llama in [row.split() for row in rows]


def test_what_was_proved_before_has_a_reason_for_every_no(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["families"]
    proved = [row for row in listed if row["proved"]]
    assert len(proved) > 200
    assert all(row["reason"] for row in listed if row["proved"] is False)
    assert all(row[part] or row[f"{part}_reason"] for row in proved for part in COLUMNS)
    (olmoe,) = [row for row in proved if row["model_type"] == "olmoe"]
    assert (olmoe["kv"], olmoe["experts"]) == (False, True)
    assert "failed the check cut" in olmoe["kv_reason"]


def test_what_nobody_tried_is_not_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cfsp.families.catalogue.proved_before", lambda: ("1.0", {}))
    assert main(["families"]) == 0
    shown = capsys.readouterr()
    assert ["llama", "LlamaForCausalLM", *5 * "?"] in [
        row.split() for row in shown.out.splitlines()
    ]


def test_named_types_are_proved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--prove", "qwen3_5", "bert", "--json"]) == 0
    bert, text, whole = json.loads(capsys.readouterr().out)["families"]
    assert (bert["model_type"], bert["proved"]) == ("bert", False)
    assert "is an encoder" in bert["reason"]
    for row, name in ((text, "Qwen3_5ForCausalLM"), (whole, "Qwen3_5ForConditionalGeneration")):
        assert (row["class"], row["proved"], row["reason"]) == (name, True, None)
        assert all((row[part], row[f"{part}_reason"]) == (True, None) for part in PARTS_OF_DENSE)
        assert not row["experts"]
        assert "has no routed experts" in row["experts_reason"]
    assert not any(bert[part] for part in COLUMNS)


def test_the_table_says_what_can_go(capsys: pytest.CaptureFixture[str]) -> None:
    # Its default model has few blocks.
    assert main(["families", "--prove", "nemotron_h"]) == 0
    *_, text = capsys.readouterr().out.splitlines()
    parts = ["yes", "no", "yes", "yes"]
    assert text.split()[:7] == ["nemotron_h", "NemotronHForCausalLM", "yes", *parts]


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--prove", "lama"]) == 2
    message = capsys.readouterr().err
    assert "no language model type 'lama'; did you mean llama?" in message


def test_a_type_that_crashes_or_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Family("llama", "NoSuchClass")
    (reason,) = set(why_not(nothing).values())
    assert "no config could be made (AttributeError" in str(reason)
    monkeypatch.setattr(trial, "PROOF_LIMIT", 0.0)
    assert set(why_not(LLAMA).values()) == {"no verdict after 0 seconds"}
    with pytest.raises(NoAnswerError, match="no verdict after 1 seconds"):
        call_apart(never_end, seconds=1.0)
    with pytest.raises(NoAnswerError, match="its process ended with status 3"):
        call_apart(crash, seconds=60.0)


def never_end() -> None:
    while True:
        pass


def crash() -> None:
    raise SystemExit(3)


def test_parts_are_tried_by_themselves() -> None:
    # Its norms are over all heads.
    reasons = why_not(Family("olmoe", "OlmoeForCausalLM"))
    assert "failed the check cut" in str(reasons.pop("kv"))
    assert reasons == dict.fromkeys(("ffn", "attention", "experts", "blocks"))
