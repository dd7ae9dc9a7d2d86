"""Runs for the tests of the report: real prunings of a tiny model, and variations of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builders import edit_json

# Of a model, before it is pruned.
CARD = """\
---
license: other
license_name: tiny-community
license_link: LICENSE
language: [en, de]
datasets: [someone/corpus]
tags: [chat, pruned]
pipeline_tag: text-generation
base_model: someone/ancestor
model-index: [{name: other, results: []}]
widget: [{text: Hello}]
---
# A model
"""
# Entries of a step of repair.
FITTED: dict[str, Any] = {
    "error_before": 0.5, "error_after": 0.25, "kept": True, "strength": 0.3,
}  # fmt: skip
DIVERGED = FITTED | {"error_before": 0.375, "error_after": None, "kept": False, "strength": None}

HISTORY = [
    {"step": 0, "held_out": 3.7257},
    {"step": 10, "held_out": 3.5041, "loss": 3.5},
    {"step": 20, "held_out": 3.4054, "loss": 3.25},
]


def changed_copy(run: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a run and change its manifest, which is one of version 2."""
    shutil.copytree(run, out)
    edit_json(out / "cfsp.json", change)
    return out


def measured(text: str, before: float, after: float, **conditions: Any) -> dict[str, Any]:
    """Return a manifest's perplexity, on 12 windows of 512 tokens unless told otherwise."""
    common = {"windows": 12, "seqlen": 512, "bos": False, "evaluation_part": False}
    common |= {"tokens_digest": "1" * 64, "dtype": "float32", **conditions}
    tokens = common["windows"] * (common["seqlen"] - 1)
    return {text: {"before": before, "after": after, "tokens": tokens, **common}}


def recovered(manifest: dict[str, Any]) -> None:
    """Make a manifest that of a recovered run, with the keys that recovery writes."""
    text, value = next(iter(manifest["perplexity"].items()))
    manifest |= {
        "operation": "recover",
        "pruned": {"command": manifest["command"]},
        "command": "cfsp recover pruned --out recovered",
        "recovery": {
            "adaptation": {"method": "lora", "rank": 8, "allocation": "uniform"},
            "training": {"seqlen": 512, "learning_rate": 1e-4, "seed": 0},
            "teacher": None,
            "trainable_parameters": 1000,
            "data": {"sources": {text: 10}},
            "steps": 20,
            "tokens_in_step": 512,
            "tokens": 10_240,
            "tokens_per_second": 300.0,
            "history": HISTORY,
            "perplexity": {text: {**value, "before": value["after"], "after": 123.25}},
        },
    }
