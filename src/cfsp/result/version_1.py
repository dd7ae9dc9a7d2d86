"""A manifest of version 1, which cfsp 0.1 wrote, as one of version 2.

Version 1 kept repair by block (`restoration`), under keys that differ from method to method, and
did not say how windows were cut for a perplexity.
"""

from __future__ import annotations

from typing import Any

# Of a perplexity, version 1 has only the number of tokens. Windows never began with BOS then.
_UNKNOWN = {"windows": None, "seqlen": None, "stride": None, "bos": False}


def as_version_2(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the same facts as version 2 has them.

    Raises:
        KeyError, TypeError, AttributeError: the manifest is damaged.
    """
    fields = {key: value for key, value in manifest.items() if key != "restoration"}
    fields["manifest_version"] = 2
    if "restoration" in manifest:
        fields["repair"] = {"steps": _steps(manifest["restoration"] or {})}
    for holder in ("pruned", "recovery"):
        if fields.get(holder):
            fields[holder] = _with_conditions(fields[holder])
    return _with_conditions(fields)


def _with_conditions(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table whose perplexities say that their windows are not known."""
    measured = table.get("perplexity") or {}
    known = {text: {**_UNKNOWN, **value} for text, value in measured.items()}
    return {**table, "perplexity": known} if "perplexity" in table else table


def _steps(restoration: dict[str, Any]) -> list[dict[str, Any]]:
    blocks = restoration.get("blocks", [])
    if restoration and not blocks:
        return [{"name": restoration["method"], "blocks": []}]  # a bias, which has no errors
    steps = [{"name": "ridge", "blocks": [_ridge(block) for block in blocks]}] if blocks else []
    for name in ("sequential", "local"):
        if any(name in block for block in blocks):
            entries = [block.get(name) and _later(block[name]) for block in blocks]
            steps.append({"name": name, "blocks": entries})
    return steps


def _ridge(block: dict[str, Any]) -> dict[str, Any]:
    experts = [
        {**_fit(expert), "few_tokens": expert["few_tokens"]} for expert in block.get("experts", [])
    ]
    one = {"blocks": 1, **_fit(block), "training_steps": 0}
    return one | ({"experts": experts} if experts else {})


def _fit(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "error_before": fields["error_before"],
        "error_after": fields["error_after"],
        "kept": fields["ridge"] is not None,
        "strength": fields["ridge"],
    }


def _later(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "blocks": fields.get("blocks", 1),
        "error_before": fields["error_before"],
        "error_after": fields["error_after"],
        "kept": fields["is_better"],
        "strength": fields.get("ridge"),
        "training_steps": fields["steps"],
    }
