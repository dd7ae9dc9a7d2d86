"""benchmarks/families.py: what it writes is what `cfsp families` reads."""

from __future__ import annotations

import json

from cfsp.families.catalogue import Family, proved_before
from conftest import REPOSITORY
from families import line_of


def test_the_published_lines_are_what_it_writes():
    _, before = proved_before()
    published = (REPOSITORY / "src/cfsp/families/proved.json").read_text(encoding="utf-8")
    assert published.splitlines()[1:-1] == [
        line_of(family, reasons) + "," * (number < len(before))
        for number, (family, reasons) in enumerate(before.items(), 1)
    ]


def test_a_long_reason_is_cut_and_what_can_go_has_none():
    reasons = {"ffn": None, "kv": "a | b\n" + 200 * "c"}
    row = json.loads(line_of(Family("a", "A"), reasons))
    assert row["class"] == "A"
    assert list(row["why_not"]) == ["kv"]
    assert row["why_not"]["kv"].startswith("a | b ccc") and len(row["why_not"]["kv"]) == 164
