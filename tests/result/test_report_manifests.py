"""Repair and conditions of a manifest, in words."""

from __future__ import annotations

from typing import Any

import pytest

from cfsp.architecture.block_names import counted
from cfsp.result.conditions import Conditions, sources_in_words
from cfsp.result.repair_steps import steps_in_words


def step(name: str, **kept: bool) -> dict[str, Any]:
    """Return a step as a manifest has it, by block: of one that lost nothing `idle` is said."""
    blocks = [
        {"blocks": 1, "kept": is_kept, "error_before": 0.0 if name_of == "idle" else 1.0}
        for name_of, is_kept in kept.items()
    ]
    return {"name": name, "blocks": blocks}


def test_steps_in_words() -> None:
    steps = [
        step("ridge", first=True, second=False),
        step("sequential", first=False, second=False),
        step("local", idle=False, first=True),
    ]
    words = "ridge (rejected in block 1), sequential (rejected in every block), local"
    assert steps_in_words(steps) == words


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"windows": 12, "seqlen": 1024, "bos": True}, "12 windows of 1,024 tokens, with BOS"),
        (
            {"windows": 1, "seqlen": 512, "stride": 256},
            "1 window of 512 tokens, stride 256, without BOS",
        ),
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
