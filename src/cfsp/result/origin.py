"""The model that a checkpoint was made from, as a card names it: hub id, license, language."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from cfsp.checkpoint.locating import DEMO_NAME
from cfsp.checkpoint.reading import Checkpoint
from cfsp.result.manifest import read_manifest

CARD_FILE = "README.md"

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


def is_hub_id(name: object) -> TypeGuard[str]:
    """Whether a name is OWNER/NAME, or OWNER/NAME@REVISION, and no path on this machine."""
    shape = r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?"
    if not isinstance(name, str) or re.fullmatch(shape, name) is None:
        return False
    return not Path(name).exists()


def public_name(name: str) -> str:
    """Return what others may read of a model's or text's name: of a path its last part."""
    if is_hub_id(name.partition(":")[0]):  # names of texts that come with cfsp look like one
        return name
    return PurePath(name).name or name


def public_command(command: str) -> str:
    """Return a command with the public name of every path in it."""
    return re.sub(r"'([^']+)'|[^\s'\"=(),]+", _public_word, " ".join(command.split()))


def _public_word(word: re.Match[str]) -> str:
    quoted = word.group(1)
    return public_name(word.group()) if quoted is None else f"'{public_name(quoted)}'"


def _card_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; none if there is no card, or none that can be read."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # a card may hold anything, and YAML and the hub have errors of many types
        return {}
    return found
