"""The shape of a manifest: whether it holds what people are told from it, before they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import CheckpointError
from cfsp.result.manifest import read_manifest


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_error(value: Any) -> bool:
    """Whether a value can be drawn on a scale from zero; JSON as Python reads it has NaN too."""
    return _is_number(value) and 0 <= value <= sys.float_info.max


# What a value has to be: a name and its test; a table by its keys, of which those with ? may be
# missing or null and * stands for any; a list of one kind, whose items may be null beside a None.
Shape = tuple[str, Callable[[Any], bool]] | dict[str, Any] | list[Any]
_NUMBER: Shape = ("a number", _is_number)
_WHOLE: Shape = ("a whole number", _is_whole)
_TEXT: Shape = ("text", lambda value: isinstance(value, str))
_FLAG: Shape = ("true or false", lambda value: isinstance(value, bool))
_ERROR: Shape = ("a finite number from 0", _is_error)

_SIZES: dict[str, Shape] = {
    "parameters_before": _NUMBER,
    "parameters_after": _NUMBER,
    "model_sparsity": _NUMBER,
    "ffn_sparsity": _NUMBER,
    "widths_before": [_WHOLE],
    "intermediate_sizes": [_WHOLE],
}
_PERPLEXITIES: Shape = {
    "*": {"before": _NUMBER, "after": _NUMBER, "tokens": _NUMBER, "windows": _WHOLE,
          "seqlen": _WHOLE, "stride?": _WHOLE}
}  # fmt: skip
_ESTIMATE = {"value": _NUMBER, "stderr?": _NUMBER}
_PAIR = dict.fromkeys(("first", "second", "difference"), _ESTIMATE)
_PAIRS = dict.fromkeys(("loss?", "divergence?", "agreed?", "accuracy?", "kept?"), _PAIR)
_PART = {"before": [_WHOLE], "after": [_WHOLE], "sparsity": _NUMBER}
_ENTRY: Shape = {
    "blocks": _WHOLE, "kept": _FLAG, "error_before": _ERROR, "error_after?": _ERROR,
    "strength?": _NUMBER, "training_steps?": _NUMBER, "block?": _WHOLE, "path?": _TEXT,
    "experts?": [{"kept": _FLAG}],
}  # fmt: skip
_MANIFEST: Shape = {
    **{f"{key}?": shape for key, shape in _SIZES.items()},
    "base_model?": {"name": _TEXT},
    "criterion?": {"block_metric": _TEXT, "channel_metric": _TEXT, "multiple": _WHOLE,
                   "sparsity": _NUMBER, "of": _TEXT, "removal?": _TEXT},
    "calibration?": {"sources": {"*": _WHOLE}, "windows": _WHOLE, "seqlen": _WHOLE},
    "kv_groups?": _PART,
    "experts?": {**_PART, "lost_output": [_NUMBER]},
    "removed_blocks?": [_WHOLE],
    "removed_attentions?": [_WHOLE],
    "perplexity?": _PERPLEXITIES,
    "comparison?": {**_PAIRS, "texts?": {"*": _PAIRS}, "tasks?": {"*": _PAIRS}},
    "repair?": {"steps?": [{"name": _TEXT, "blocks": [None, _ENTRY]}]},
    "recovery?": {"perplexity?": _PERPLEXITIES,
                  "history?": [{"step": _NUMBER, "perplexity": _NUMBER, "loss?": _NUMBER}]},
    "pruned?": {},
    "seconds?": {"*": _NUMBER},
    "versions?": {"*": _TEXT},
    "speed?": {},
}  # fmt: skip


def checked_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint, checked; None if cfsp did not write the checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    manifest = read_manifest(directory)
    if manifest is not None:
        check_manifest(manifest, directory)
    return manifest


def check_manifest(manifest: dict[str, Any], directory: Path) -> None:
    """Check that numbers are numbers and tables are tables.

    Raises:
        CheckpointError: they are not, or the size of the model is only half there.
    """
    for fault in _faults(manifest):
        path = directory / MANIFEST_FILE
        raise CheckpointError(f"{path} is damaged: {fault}; prune the model again")


def _faults(manifest: dict[str, Any]) -> Iterator[str]:
    sizes = [key for key in _SIZES if key in manifest]
    # What a model in memory says of itself in its config has not all of them, nor a version.
    if "manifest_version" in manifest and 0 < len(sizes) < len(_SIZES):
        yield f"of the model's size it has only {', '.join(sizes)}"
    yield from _misshapen(manifest, _MANIFEST, "")
    for number, step in enumerate((manifest.get("repair") or {}).get("steps") or ()):
        for index, entry in enumerate(step["blocks"]):
            where = f"repair.steps[{number}].blocks[{index}]"
            if entry is None:
                continue
            if not 1 <= entry["blocks"] <= index + 1:
                yield f"{where}.blocks should be from 1 to {index + 1}, found {entry['blocks']}"
            # Null is what training leaves whose error is NaN; such weights are rejected.
            if "error_after" not in entry or (entry["error_after"] is None and entry["kept"]):
                yield f"{where}.error_after is missing"
            if "block" in entry and "path" not in entry:
                yield f"{where}.path is missing"


def _misshapen(value: Any, shape: Shape, where: str) -> Iterator[str]:
    """Yield what is not as it has to be, with where it is: `repair.steps[0].name`."""
    if isinstance(shape, tuple):
        name, test = shape
        if not test(value):
            yield f"{where} should be {name}, found {repr(value)[:40]}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} should be a list"
            return
        for index, item in enumerate(value):
            if item is not None or None not in shape:
                yield from _misshapen(item, shape[-1], f"{where}[{index}]")
    elif not isinstance(value, dict):
        yield f"{where} should be a table"
    else:
        for key, inner in shape.items():
            name = key.removesuffix("?")
            for each in value if key == "*" else [name]:
                place = f"{where}.{each}".removeprefix(".")
                if each not in value and not key.endswith("?"):
                    yield f"{place} is missing"
                elif value.get(each) is not None or not key.endswith("?"):
                    yield from _misshapen(value[each], inner, place)
