"""How a checkpoint was made, in words: the same lines on the card, on the page and by `inspect`.

And the Python that loads it. Of repair a manifest records its steps. A step has a name and for each
block an entry: how many blocks changed together, the error before and after, and whether the new
weights were kept. Blocks that changed together have one entry, at the last of them; the others have
None, as blocks without an FFN have. Where blocks have several FFNs there is an entry for each,
which names its block and its path in that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.planning.importance import SCORE_IN_WORDS
from cfsp.repair.result import rejected_blocks
from cfsp.result.facts import recoveries, repair_text, was_pruned
from cfsp.result.names import public_command, public_name
from cfsp.result.tables import human_bytes
from cfsp.settings import ANGULAR, DEFAULT_PARTS, UNIT_PARTS, parts_in_words, removal_in_words


@dataclass(frozen=True)
class Making:
    """One of the commands that made a checkpoint, without paths of the machine."""

    verb: str  # pruned or recovered
    command: str
    facts: dict[str, str]  # how, in words by what they are about


def making(manifest: Mapping[str, Any]) -> list[Making]:
    """Return how a checkpoint was made: how it was pruned, and after that recovered."""
    stages = []
    if was_pruned(manifest):
        # What recovery has of its own, it put in the place of what pruning had.
        own = {**manifest, **(manifest.get("pruned") or {})}
        stages.append(Making("pruned", _command(own), _pruning(manifest) | _cost(own)))
    return stages + [
        Making("recovered", _command(each), _recovery(each) | _cost(each))
        for each in recoveries(manifest)
    ]


def _command(made: Mapping[str, Any]) -> str:
    return public_command(str(made.get("command") or "not recorded"))


def _pruning(manifest: Mapping[str, Any]) -> dict[str, str]:
    criterion = manifest["criterion"]
    parts = criterion.get("parts", DEFAULT_PARTS)
    channels = parts_in_words(part for part in UNIT_PARTS if part in parts)
    of = {
        "ffn": f"{channels} of what stays" if {*parts} - {*UNIT_PARTS} else channels,
        "attention": "attention parameters",
        "blocks": "block parameters",
        "experts": "experts",
    }[criterion["of"]]
    facts = {}
    if goal := manifest.get("goal"):
        name = goal["goal"].replace("_", "-")
        tried = f", {len(goal['tried'])} plans tried" if goal["tried"] else ""
        facts["goal"] = f"--{name} {goal['asked']:g}{tried}"
    facts["chosen" if goal else "asked for"] = f"{criterion['sparsity']:.1%} of {of}"
    if channels:
        metric = criterion["block_metric"]
        facts["blocks by"] = f"{metric} distance" if metric == ANGULAR else metric
        facts["channels by"] = criterion["channel_metric"]
    if any(manifest.get(key) for key in ("removed_blocks", "removed_attentions")):
        facts["removed whole"] = f"those {removal_in_words(criterion.get('removal', ''))}"
    if experts := manifest.get("experts"):
        lost = f"{fmean(experts['lost_output']):.1%} of what all experts add to the hidden states"
        facts["experts by"] = f"{SCORE_IN_WORDS}; those that went added {lost}"
    if "ffn" in parts:
        facts["widths"] = f"multiples of {criterion['multiple']}"
    if calibration := manifest.get("calibration"):
        facts["calibration text"] = texts_in_words(calibration)
        facts["calibration"] = (
            f"{counted(calibration['windows'], 'windows')} of {calibration['seqlen']} tokens, seed "
            f"{calibration['seed']}, {calibration['dtype']} on {calibration['device']}"
        )
    if "repair" in manifest:
        facts["repair"] = steps_in_words(manifest["repair"]["steps"])
    if text := repair_text(manifest):
        facts["repair text"] = f"{texts_in_words(text)} of {text['seqlen']} tokens"
    return facts


def _recovery(recovery: Mapping[str, Any]) -> dict[str, str]:
    how, training, teacher = (recovery[key] for key in ("adaptation", "training", "teacher"))
    trained = "all projections"
    if how["method"] != "full":
        equal = how["allocation"] == "uniform"
        ranks = "equal in all blocks" if equal else f"ranks by {how['allocation']}"
        trained = f"{how['method']} of mean rank {how['rank']:g}, {ranks}"
    facts = {
        "trained": f"{trained}; {recovery['trainable_parameters']:,} parameters",
        "recovery text": f"{trained_in_words(recovery)} of {training['seqlen']} tokens",
        "training": f"{counted(recovery['steps'], 'steps')} of {recovery['tokens_in_step']:,} "
        f"tokens, {recovery['tokens_per_second']:,.0f} tokens/s, peak learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}",
    }
    if teacher:
        facts["teacher"] = f"{public_name(teacher['name'])}, weight {teacher['weight']:g}"
    return facts


def _cost(made: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if made.get("seconds"):
        facts["time"] = seconds_in_words(made["seconds"])
    if "peak_rss_bytes" in made:
        threads = f", {counted(made['threads'], 'threads')}" if made.get("threads") else ""
        facts["memory"] = f"{human_bytes(made['peak_rss_bytes'])} at its peak{threads}"
    if made.get("versions"):
        facts["versions"] = ", ".join(f"{name} {v}" for name, v in made["versions"].items())
    if made.get("created"):
        facts["made"] = str(made["created"])
    return facts


def seconds_in_words(seconds: Mapping[str, float]) -> str:
    """Return what stages took: `text 0.1 s, ridge 12.0 s`."""
    return ", ".join(f"{stage} {s:.1f} s" for stage, s in seconds.items())


def texts_in_words(table: Mapping[str, Any] | None) -> str:
    """Return the texts of a calibration or of training: `c4 (64 windows), own.txt (1 window)`."""
    sources = (table or {}).get("sources", {})
    return ", ".join(f"{public_name(n)} ({counted(c, 'windows')})" for n, c in sources.items())


def trained_in_words(recovery: Mapping[str, Any]) -> str:
    """Return how many windows were trained on, and those of each text that they were drawn from."""
    read = counted(recovery["tokens"] // recovery["training"]["seqlen"], "windows")
    return f"{read}, drawn from {texts_in_words(recovery.get('data'))}"


def changed_weights(step: Mapping[str, Any]) -> bool:
    """Return whether a step's weights were kept in any block."""
    return not step["blocks"] or any(entry and entry["kept"] for entry in step["blocks"])


def steps_in_words(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return the steps, the mean error of each where something was cut, and what it rejected."""
    told = []
    for step in steps:
        rejected, where = rejected_blocks(step), "every block"
        if changed_weights(step):
            noun = "block" if len(rejected) == 1 else "blocks"
            where = f"{noun} {', '.join(rejected)}"
        remarks = [f"rejected in {where}"] if rejected else []
        if blocks := [each for each in step["blocks"] if each and each["error_before"] > 0]:
            before = fmean(block["error_before"] for block in blocks)
            after = fmean(
                block["error_after" if block["kept"] else "error_before"] for block in blocks
            )
            of = "outputs" if step["name"] == "ridge" else "hidden states"
            remarks.insert(0, f"error of {of} {before:.3f} to {after:.3f}")
        told.append(step["name"] + (f" ({', '.join(remarks)})" if remarks else ""))
    return ", ".join(told) or "none"


def needs_code(manifest: Mapping[str, Any]) -> bool:
    """Return whether transformers needs the modelling file beside the weights."""
    return MODELING_FILE in manifest.get("files", {})


def auto_class_of(manifest: Mapping[str, Any]) -> str:
    """Return the Auto class of a checkpoint's model."""
    # Of what was trained without having been pruned there is no base model.
    own = manifest.get("model_type", "")
    return auto_class_of_type(manifest.get("base_model", {}).get("model_type", own))


def load_code(manifest: Mapping[str, Any], where: str) -> str:
    """Return the lines that load a model and its tokenizer or processor from a place."""
    model = auto_class_of(manifest)
    name, reader = ("tokenizer", "AutoTokenizer")
    if model != "AutoModelForCausalLM":
        name, reader = ("processor", "AutoProcessor")
    trust = ", trust_remote_code=True" if needs_code(manifest) else ""
    place = json.dumps(where, ensure_ascii=False)
    return (
        f"from transformers import {model}, {reader}\n\n"
        f"model = {model}.from_pretrained({place}{trust})\n"
        f"{name} = {reader}.from_pretrained({place})"
    )
