"""What a perplexity was measured on, and how: two of them compare only if all of it is equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.text.offline import parts_of


@dataclass(frozen=True)
class Conditions:
    """Conditions of a perplexity."""

    text: str
    tokens: int  # that were predicted
    windows: int
    seqlen: int
    bos: bool = False
    # Of a part of the text that nothing is calibrated or trained on; False if it was not recorded.
    evaluation_part: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, text: str, entry: dict[str, Any]) -> Conditions:
        """Return those of an entry of a manifest or of `cfsp eval --json`."""
        return cls(
            text,
            int(entry["tokens"]),
            int(entry["windows"]),
            int(entry["seqlen"]),
            bool(entry.get("bos", False)),
            bool(entry.get("evaluation_part", False)),
        )

    def beside(self, models: Mapping[str, Mapping[str, Any]]) -> str:
        """Return all but the text, and which models it made, given their manifests by name."""
        names = {self.text, *parts_of(self.text)}
        made = [name for name, each in models.items() if names & texts_that_made(each)]
        if not made:
            return str(self)
        text = "other parts of this text" if self.evaluation_part else "this text"
        return (
            f"{self}; {text} made {' and '.join(made) if len(made) < len(models) else 'the model'}"
        )

    def __str__(self) -> str:
        """Return all but the text: `12 windows of 1,024 tokens, with BOS`."""
        bos = "with BOS" if self.bos else "without BOS"
        return f"{counted(self.windows, 'windows')} of {self.seqlen:,} tokens, {bos}"


def texts_that_made(manifest: Mapping[str, Any]) -> set[str]:
    """Return the names of the texts that a model was calibrated, repaired or trained on."""
    tables = [manifest.get("calibration"), (manifest.get("recovery") or {}).get("data")]
    return {name for table in tables for name in (table or {}).get("sources", {})}


def perplexities(manifest: Mapping[str, Any]) -> dict[Conditions, dict[str, float]]:
    """Return what a manifest has by conditions: of the `dense`, `pruned` and `recovered` model.

    Only numbers under the same conditions compare.
    """
    found: dict[Conditions, dict[str, float]] = {}
    recovery = manifest.get("recovery") or {}
    for before, after, table in (("dense", "pruned", manifest), ("pruned", "recovered", recovery)):
        for text, value in (table.get("perplexity") or {}).items():
            of_models = found.setdefault(Conditions.of(text, value), {})
            of_models |= {before: float(value["before"]), after: float(value["after"])}
    return found
