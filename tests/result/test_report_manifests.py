"""Manifests: those of version 1 are read as version 2, and repair and conditions in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp.architecture.block_names import counted
from cfsp.errors import CheckpointError
from cfsp.repair.repaired import rejected_blocks
from cfsp.result.conditions import Conditions, sources_in_words
from cfsp.result.manifest import add_to_manifest, read_manifest
from cfsp.result.repair_steps import repair_steps, steps_in_words

# What cfsp 0.1 wrote for a tiny Mixtral (ridge) and a tiny Llama (all others).
RECORDED = json.loads((Path(__file__).parent / "manifests_of_version_1.json").read_text())


def read(manifest: dict[str, Any], directory: Path) -> dict[str, Any]:
    (directory / "cfsp.json").write_text(json.dumps(manifest))
    found = read_manifest(directory)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["none", "bias", "ridge", "sequential", "local"])
def test_version_1_is_read_as_version_2(tmp_path: Path, name: str) -> None:
    old = RECORDED[name]
    new = read(old, tmp_path)
    assert old["manifest_version"] == 1 and new["manifest_version"] == 2
    assert "restoration" not in new
    same = set(old) - {"manifest_version", "restoration", "perplexity"}
    assert {key: new[key] for key in same} == {key: old[key] for key in same}
    ladder = ["ridge", "sequential", "local"]
    names = ladder[: ladder.index(name) + 1] if name in ladder else [name] * (name == "bias")
    assert [step["name"] for step in repair_steps(new)] == names
    assert new["perplexity"] == {
        "prose.txt": old["perplexity"]["prose.txt"]
        | {"windows": None, "seqlen": None, "stride": None, "bos": False}
    }


def test_steps_of_version_1_keep_every_number(tmp_path: Path) -> None:
    old = RECORDED["local"]["restoration"]["blocks"]
    ridge, sequential, local = repair_steps(read(RECORDED["local"], tmp_path))
    assert ridge["blocks"][1] == {
        "blocks": 1, "error_before": old[1]["error_before"], "error_after": old[1]["error_after"],
        "kept": True, "strength": old[1]["ridge"], "training_steps": 0,
    }  # fmt: skip
    # Block 0 lost nothing, so there was nothing to reject.
    assert rejected_blocks(ridge) == [] and ridge["blocks"][0]["strength"] is None
    assert rejected_blocks(sequential) == ["0", "1", "2"]
    assert local["blocks"][:2] == [None, None]
    last = old[2]["local"]
    assert local["blocks"][2] == {
        "blocks": 3, "error_before": last["error_before"], "error_after": last["error_after"],
        "kept": True, "strength": None, "training_steps": last["steps"],
    }  # fmt: skip
    assert steps_in_words([ridge, sequential, local]) == (
        "ridge, sequential (rejected in every block), local"
    )


def test_experts_of_version_1(tmp_path: Path) -> None:
    old = RECORDED["ridge"]["restoration"]["blocks"]
    (ridge,) = repair_steps(read(RECORDED["ridge"], tmp_path))
    assert len(ridge["blocks"][1]["experts"]) == 4
    for new, expert in zip(ridge["blocks"][1]["experts"], old[1]["experts"], strict=True):
        assert new == {
            "error_before": expert["error_before"], "error_after": expert["error_after"],
            "kept": True, "strength": expert["ridge"], "few_tokens": False,
        }  # fmt: skip
    assert not any(expert["kept"] for expert in ridge["blocks"][0]["experts"])


def test_recovered_perplexities_of_version_1(tmp_path: Path) -> None:
    old = dict(RECORDED["ridge"])
    old["recovery"] = {"perplexity": old["perplexity"], "steps": 3}
    old["pruned"] = {"perplexity": old["perplexity"]}
    new = read(old, tmp_path)
    assert new["recovery"] == {"perplexity": new["perplexity"], "steps": 3}
    assert new["pruned"]["perplexity"]["prose.txt"]["seqlen"] is None


@pytest.mark.parametrize(
    "restoration",
    [3, {"blocks": 3, "method": "ridge"}, {"method": "ridge", "blocks": [{}]},
     {"method": "local", "blocks": [RECORDED["local"]["restoration"]["blocks"][0] | {"local": 1}]}],
)  # fmt: skip
def test_damaged_version_1_is_refused(tmp_path: Path, restoration: Any) -> None:
    with pytest.raises(CheckpointError, match=r"cfsp\.json is damaged"):
        read(RECORDED["ridge"] | {"restoration": restoration}, tmp_path)


def test_what_is_added_to_an_old_manifest_makes_it_a_new_one(tmp_path: Path) -> None:
    new = read(RECORDED["sequential"], tmp_path)
    add_to_manifest(tmp_path, {"speed": 1})
    assert read_manifest(tmp_path) == new | {"speed": 1}
    assert json.loads((tmp_path / "cfsp.json").read_text())["manifest_version"] == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"windows": 12, "seqlen": 1024, "bos": True}, "12 windows of 1,024 tokens, with BOS"),
        (
            {"windows": 1, "seqlen": 512, "stride": 256},
            "1 window of 512 tokens, stride 256, without BOS",
        ),
        ({}, "1,023 predicted tokens, windows not recorded, without BOS"),
    ],
)
def test_conditions_in_words(entry: dict[str, Any], words: str) -> None:
    conditions = Conditions.of("news", {"tokens": 1023, **entry})
    assert str(conditions) == words
    assert conditions == Conditions.of("news", {"value": 3.0, "tokens": 1023, **entry})
    assert conditions != Conditions.of("news", {"tokens": 1023, **entry, "seqlen": 2048})


@pytest.mark.parametrize(
    ("text", "evaluation_part", "words"),
    [
        ("mine.txt", False, "; this text made the model"),
        ("mixed", True, "; other parts of this text made the model"),
        ("mixed/books", True, "; other parts of this text made the model"),
        ("python-docs", True, "; other parts of this text made other"),
        ("c4", True, ""),
    ],
)
def test_conditions_say_whether_the_text_made_the_model(
    text: str, evaluation_part: bool, words: str
) -> None:
    entry = {"tokens": 9, "windows": 1, "seqlen": 10, "evaluation_part": evaluation_part}
    manifest = {"calibration": {"sources": {"mixed/books": 3, "mine.txt": 5}}}
    trained = manifest | {"recovery": {"data": {"sources": {"python-docs": 2}}}}
    conditions = Conditions.of(text, entry)
    told = conditions.beside({"one": manifest, "other": trained})
    assert told == f"1 window of 10 tokens, without BOS{words}"
    # What was not recorded does not tell numbers apart.
    assert conditions == Conditions.of(text, {**entry, "evaluation_part": False})


def test_one_of_a_thing_is_said_as_one() -> None:
    assert counted(1, "windows") == "1 window"
    assert counted(2000, "steps") == "2,000 steps"
    assert sources_in_words({"c4": 64, "own.txt": 1}) == "c4 (64 windows), own.txt (1 window)"
