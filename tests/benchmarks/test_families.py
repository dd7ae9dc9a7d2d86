"""benchmarks/families.py: what is written of the results into docs/families.md."""

from __future__ import annotations

import sys
from typing import Any

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from families import proved_types


def test_every_part_has_a_column_and_what_cannot_go_a_reason() -> None:
    none = "whole experts of A can't be removed: it has no routed experts whose matrices ..."
    row: dict[str, Any] = {
        "model_type": "a", "class": "A", "proved": True, "reason": None, "kv": True,
        "kv_reason": None, "attention": True, "attention_reason": None,
        "experts": False, "experts_reason": none, "blocks": False,
        "blocks_reason": "a rule",
    }  # fmt: skip
    text = proved_types([row], "5")
    assert "| a | `A` | yes | yes | yes | - | no |" in text
    assert "| a | `A` | a rule |" in text
    assert text.count("| a |") == 2
    without_ffns = {**row, "proved": False, "reason": "a norm"}
    text = proved_types([without_ffns], "5")
    assert "| a | `A` | no | yes | yes | - | no |" in text
    assert "| a | `A` | a norm |" in text
