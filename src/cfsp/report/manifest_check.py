"""Whether a manifest holds what a page is made of, before anything is drawn from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import ReportError

_NUMBERS = ("parameters_before", "parameters_after", "model_sparsity", "ffn_sparsity")
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
    for key in ("base_model", "criterion", "calibration", "restoration", "perplexity", "recovery",
                "seconds", "versions", "speed", "pruned"):  # fmt: skip
        if not isinstance(manifest.get(key) or {}, dict):
            yield f"{key} should be a table"
            return
    recovery = manifest.get("recovery") or {}
    for table in (manifest.get("perplexity") or {}, recovery.get("perplexity") or {}):
        for text, value in table.items():
            if not _has_numbers(value, "before", "after", "tokens"):
                yield f"the perplexity on {text!r} lacks a number"
    blocks = (manifest.get("restoration") or {}).get("blocks", [])
    if not isinstance(blocks, list):
        yield "restoration's blocks should be a list"
        return
    for index, block in enumerate(blocks):
        if not _has_numbers(block, "error_before", "error_after") or "ridge" not in block:
            yield "an entry of restoration lacks a number"
            continue
        for name in ("sequential", "local"):
            if block.get(name) is not None:
                yield from _complaints_of_reconstruction(block[name], name, index)
    for entry in recovery.get("history", []):
        if not _has_numbers(entry, "step", "perplexity"):
            yield "an entry of recovery's history lacks a number"


def _complaints_of_reconstruction(entry: Any, name: str, index: int) -> Iterator[str]:
    """Yield what is wrong with a block's entry under a further step (see `PruneReport`)."""
    what = f"the {name} reconstruction of block {index}"
    if not isinstance(entry, dict):
        yield f"{what} should be a table"
        return
    better, steps = entry.get("is_better"), entry.get("steps", -1)
    if not isinstance(better, bool):
        yield f"{what} does not say whether the block is better for it"
    if not _is_int(steps) or steps < 0:
        yield f"{what} lacks its number of steps"
    if not _is_error(entry.get("error_before")):
        yield f"{what} lacks the error before it"
    # Null is what training leaves that came to no number; such a block is not better for it.
    after = entry.get("error_after", "missing")
    if not _is_error(after) and (after is not None or better):
        yield f"{what} lacks the error after it"


def _has_numbers(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and all(_is_number(entry.get(key)) for key in keys)


def _is_error(value: Any) -> bool:
    """Whether a value can be drawn on a scale from zero; JSON as Python reads it has NaN too."""
    return _is_number(value) and 0 <= value <= sys.float_info.max


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
