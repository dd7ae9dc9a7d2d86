"""The model card (README.md) of a checkpoint: metadata for the hub, and plain words for people.

Its text is in card.md beside this file. What comes from elsewhere is quoted there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from cfsp.checkpoint.locating import DEMO_NAME
from cfsp.checkpoint.own_files import CARD_FILE, MODELING_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.facts import (
    first_model,
    goal_in_words,
    goal_table,
    perplexities,
    recoveries,
    repair_text,
    size_facts,
    unit_rows,
    was_pruned,
    what_went,
)
from cfsp.result.making import (
    auto_class_of,
    changed_weights,
    load_code,
    making,
    needs_code,
    texts_in_words,
    trained_in_words,
)
from cfsp.result.manifest import facts_about, write_manifest
from cfsp.result.names import is_hub_id, public_name
from cfsp.result.tables import Table

# What holds for the pruned model as it does for its original.
_KEPT = (
    "license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The model that a checkpoint was made from."""

    name: str  # what the user called it
    hub_id: str | None = None  # its own owner/name, or owner/name@revision, where that is known
    base_model: str | None = None  # the hub id, else the one that its card gives as its base
    metadata: dict[str, Any] = field(default_factory=dict)  # that hold for the pruned model, too


_DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO = Origin(DEMO_NAME, _DEMO_ID, _DEMO_ID, {"license": "apache-2.0", "language": ["en"]})


def origin_of(source: Checkpoint) -> Origin:
    """Return what is known of a model; of one that cfsp wrote, what is known of its original."""
    given = facts_about(source).get("base_model", {}).get("name")
    name = str(source.label if given is None else given)
    if name == DEMO_NAME:
        return _DEMO
    card = _metadata_of(source.directory / CARD_FILE)
    # A snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots", name)
    # What was given then may be a path in another directory than today's: its card knows.
    is_told = given is None or not card or card.get("base_model") == name.partition("@")[0]
    own = name if is_told else None
    # What older versions of transformers wrote into config.json: whence it was loaded.
    saved = getattr(source.config, "_name_or_path", None)
    ids = ("/".join(cached.groups()) if cached else None, own, saved)
    hub_id = next((each for each in ids if is_hub_id(each)), None)
    base = next((each for each in (hub_id, card.get("base_model")) if is_hub_id(each)), None)
    base = base and base.partition("@")[0]  # all that the hub knows there
    return Origin(name, hub_id, base, {key: card[key] for key in _KEPT if card.get(key)})


def _metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; none if there is no card, or none that can be read."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # a card may hold anything, and YAML and the hub have errors of many types
        return {}
    return found


def write_record(
    directory: Path, manifest: dict[str, Any], plan: PruningPlan | None, source: Checkpoint
) -> None:
    """Write the manifest and the model card of what was made from a checkpoint."""
    write_manifest(directory, manifest)
    card = model_card(manifest, plan, origin_of(source))
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def model_card(manifest: dict[str, Any], plan: PruningPlan | None, origin: Origin) -> str:
    """Return the model card of a checkpoint; a plan is there if cfsp pruned it."""
    # A pruned model that is pruned again is not made from the original of both.
    made_from = manifest.get("base_model", {}).get("name", origin.name)
    hub_id = origin.hub_id if made_from == origin.name else None
    name = hub_id.partition("@")[0] if hub_id else public_name(made_from)
    link = _link(hub_id) if hub_id else _code(name)
    if origin.base_model not in (None, name):
        link += f" (which was made from {_link(str(origin.base_model))})"
    went = ""
    if "ffn_sparsity" in manifest:
        went = what_went(manifest, by_channels=plan is None or plan.counts_channels)
    taken = (manifest.get("repair") or {}).get("steps", [])
    steps = [str(step["name"]) for step in taken if changed_weights(step)]
    return _TEMPLATES.get_template("card.md").render(
        metadata=_metadata(manifest, origin),
        name=name,
        stages=making(manifest),
        link=link,
        went=went,
        manifest=manifest,
        before=", ".join(map(public_name, manifest.get("base_model", {}).get("texts", ()))),
        calibrated=texts_in_words(manifest.get("calibration")),
        repaired=", ".join(steps),
        repaired_on=texts_in_words(repair_text(manifest)),
        recovered=", then on ".join(map(trained_in_words, recoveries(manifest))),
        sizes=Table(
            ("", "before", "after", "change"),
            [
                (fact.name + (f" ({fact.detail})" if fact.detail else ""), *fact.row)
                for fact in size_facts(manifest)
            ],
        ),
        quality=_quality(manifest),
        needs_code=needs_code(manifest),
        modeling_file=MODELING_FILE,
        load_code=load_code(manifest, "."),
        plan=plan,
        goal_in_words=goal_in_words,
        goal_table=goal_table,
        license=str(origin.metadata.get("license") or ""),
        units=Table(
            ("block", "distance", "importance", "channels before", "after"),
            unit_rows(plan.units if plan else ()),
        ),
    )


def _quality(manifest: dict[str, Any]) -> Table:
    models = [first_model(manifest), *dict.fromkeys(stage.verb for stage in making(manifest))]
    rows = [
        (
            _code(public_name(conditions.text)),
            conditions.beside({"the model": manifest}),
            *(f"{of[name]:.2f}" if name in of else "" for name in models),
        )
        for conditions, of in perplexities(manifest).items()
    ]
    return Table(("perplexity on", "measured on", *models), rows, left=2)


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id.replace('@', '/tree/')})"


def _code(text: str) -> str:
    """Quote foreign text in Markdown so that it can neither format nor script the page."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _quoted(text: str) -> str:
    return text if text == _plain(text) else _code(text)


def _plain(text: str) -> str:
    """Return foreign text without what Markdown and HTML would read as more than text."""
    one_line = " ".join(text.split())
    return "".join(c if c.isalnum() or c in " ./-_,()" else "?" for c in one_line)


def _metadata(manifest: dict[str, Any], origin: Origin) -> str:
    metadata = dict(origin.metadata)
    is_causal = auto_class_of(manifest) == "AutoModelForCausalLM"
    task = "text-generation" if is_causal else "image-text-to-text"
    tags = ["cfsp", *(["pruned"] if was_pruned(manifest) else [])]
    theirs = metadata.pop("tags", [])
    tags += [str(tag) for tag in (theirs if isinstance(theirs, list) else [theirs])]
    data = ModelCardData(
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag=metadata.pop("pipeline_tag", task),
        tags=list(dict.fromkeys(tags)),
        **metadata,
    )
    return str(data.to_yaml())


_TEMPLATES = Environment(
    loader=PackageLoader("cfsp", "result"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"code": _code, "quoted": _quoted, "plain": _plain}
