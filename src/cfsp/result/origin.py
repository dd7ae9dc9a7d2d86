"""The model that a checkpoint was made from, as a card names it: hub id, license, language."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import DEMO_NAME
from cfsp.checkpoint.own_files import CARD_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.result.manifest import read_manifest
from cfsp.result.names import is_hub_id

# What holds for the pruned model as it does for its original.
_KEPT = (
    "license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """A model.

    Attributes:
        name: what the user called it.
        hub_id: its own `owner/name` on the Hugging Face hub, or `owner/name@revision`; None where
            it is not known.
        base_model: the hub id, or where that is not known the one that its card gives as its base.
        metadata: of its model card, what holds for the pruned model too.
    """

    name: str
    hub_id: str | None = None
    base_model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


_DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO = Origin(DEMO_NAME, _DEMO_ID, _DEMO_ID, {"license": "apache-2.0", "language": ["en"]})


def origin_of(source: Checkpoint) -> Origin:
    """Return what is known of a model; of one that cfsp wrote, what is known of its original."""
    manifest = read_manifest(source.directory) or {}
    name = str(manifest.get("base_model", {}).get("name", source.label))
    if name == DEMO_NAME:
        return _DEMO
    card = _card_metadata(source.directory / CARD_FILE)
    # A snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots", name)
    ids = ("/".join(cached.groups()) if cached else None, name, _saved_name(source))
    hub_id = next((each for each in ids if is_hub_id(each)), None)
    base = next((each for each in (hub_id, card.get("base_model")) if is_hub_id(each)), None)
    base = base and base.partition("@")[0]  # all that the hub knows there
    return Origin(name, hub_id, base, {key: card[key] for key in _KEPT if card.get(key)})


def _saved_name(source: Checkpoint) -> object:
    """Return what older versions of transformers wrote into config.json: whence it was loaded."""
    return getattr(source.config, "_name_or_path", None)


def _card_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; none if there is no card, or none that can be read."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # a card may hold anything, and YAML and the hub have errors of many types
        return {}
    return found
