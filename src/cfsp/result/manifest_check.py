"""Whether a manifest holds what a page is made of, before anything is drawn from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import ReportError

_NUMBERS = ("parameters_before", "parameters_after", "model_sparsity", "ffn_sparsity")
_PAIRS = ("loss", "divergence", "agreed", "accuracy", "kept")
_SIDES = ("first", "second", "difference")
_WIDTHS = ("widths_before", "intermediate_sizes")


def check_manifest(manifest: dict[str, Any], directory: Path) -> None:
    """Check that numbers are numbers and tables are tables.

    Raises:
        ReportError: they are not, or the size of the model is only half there.
    """
    for what in _complaints(manifest):
        raise ReportError(f"{directory / MANIFEST_FILE} is damaged: {what}; make the run again")


def _complaints(manifest: dict[str, Any]) -> Iterator[str]:
    size = [key for key in (*_NUMBERS, *_WIDTHS) if key in manifest]
    if size and len(size) < len(_NUMBERS) + len(_WIDTHS):
        yield f"of the model's size it has only {', '.join(size)}"
        return
    for key in size:
        value = manifest[key]
        if key in _NUMBERS and not _is_number(value):
            yield f"{key} should be a number and is {value!r}"
        if key in _WIDTHS and not (isinstance(value, list) and value and all(map(_is_int, value))):
            yield f"{key} should be a list of whole numbers"
    for key in ("base_model", "criterion", "calibration", "repair", "perplexity", "recovery",
                "seconds", "versions", "speed", "pruned", "comparison"):  # fmt: skip
        if not isinstance(manifest.get(key) or {}, dict):
            yield f"{key} should be a table"
            return
    recovery = manifest.get("recovery") or {}
    for table in (manifest.get("perplexity") or {}, recovery.get("perplexity") or {}):
        for text, value in table.items():
            if not _has_numbers(value, "before", "after", "tokens"):
                yield f"the perplexity on {text!r} lacks a number"
            elif any(not _is_int(value.get(key) or 0) for key in ("windows", "seqlen", "stride")):
                yield f"the perplexity on {text!r} has windows that are no whole numbers"
    yield from _complaints_of_comparison(manifest.get("comparison") or {})
    steps = (manifest.get("repair") or {}).get("steps", [])
    if not isinstance(steps, list):
        yield "the steps of repair should be a list"
        return
    for step in steps:
        yield from _complaints_of_step(step)
    for entry in recovery.get("history", []):
        if not _has_numbers(entry, "step", "perplexity"):
            yield "an entry of recovery's history lacks a number"


def _complaints_of_comparison(comparison: dict[str, Any]) -> Iterator[str]:
    for key in ("texts", "tasks"):
        if not isinstance(comparison.get(key, {}), dict):
            yield f"{key} of the comparison should be a table"
            return
    tables = [*comparison.get("texts", {}).items(), *comparison.get("tasks", {}).items()]
    for name, table in [*tables, ("all tasks", comparison)]:
        pairs = [table.get(key) for key in _PAIRS] if isinstance(table, dict) else [table]
        for pair in pairs:
            sides = [pair.get(side) for side in _SIDES] if isinstance(pair, dict) else [pair]
            if pair is not None and not all(_has_numbers(side, "value") for side in sides):
                yield f"the comparison on {name!r} lacks a number"


def _complaints_of_step(step: Any) -> Iterator[str]:
    """Yield what is wrong with a step of repair (see `cfsp.result.repair_steps`)."""
    if not isinstance(step, dict) or not isinstance(step.get("name"), str):
        yield "a step of repair has no name"
        return
    if not isinstance(step.get("blocks"), list):
        yield f"the blocks of {step['name']} should be a list"
        return
    for index, entry in enumerate(step["blocks"]):
        if entry is not None:
            yield from _complaints_of_entry(entry, f"{step['name']}, block {index}", index)


def _complaints_of_entry(entry: Any, what: str, index: int) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{what} should be a table"
        return
    kept, together = entry.get("kept"), entry.get("blocks", 0)
    if "block" in entry and not (
        _is_int(entry["block"]) and entry["block"] >= 0 and isinstance(entry.get("path"), str)
    ):
        yield f"{what} does not say which FFN it is about"
    if not isinstance(kept, bool):
        yield f"{what} does not say whether the new weights were kept"
    if not _is_int(together) or not 1 <= together <= index + 1:
        yield f"{what} does not say how many blocks changed together"
    if not _is_error(entry.get("error_before")):
        yield f"{what} lacks the error before it"
    # Null is what training leaves whose error is NaN; such weights are rejected.
    after = entry.get("error_after", "missing")
    if not _is_error(after) and (after is not None or kept):
        yield f"{what} lacks the error after it"
    if not all(_is_number(entry.get(key) or 0) for key in ("strength", "training_steps")):
        yield f"{what} has a strength or training steps that are not numbers"
    experts = entry.get("experts", [])
    if not isinstance(experts, list) or not all(
        isinstance(expert, dict) and isinstance(expert.get("kept"), bool) for expert in experts
    ):
        yield f"{what} does not say which experts' new weights were kept"


def _has_numbers(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and all(_is_number(entry.get(key)) for key in keys)


def _is_error(value: Any) -> bool:
    """Whether a value can be drawn on a scale from zero; JSON as Python reads it has NaN too."""
    return _is_number(value) and 0 <= value <= sys.float_info.max


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
