"""How a checkpoint was made, in words: the same lines on the card, on the page and by `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.experts import SCORE_IN_WORDS
from cfsp.result.conditions import sources_in_words
from cfsp.result.names import public_command, public_name
from cfsp.result.repair_steps import steps_in_words
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, block_metric_in_words, removal_in_words


@dataclass(frozen=True)
class Making:
    """One of the commands that made a checkpoint.

    Attributes:
        verb: `pruned` or `recovered`.
        command: what was typed, without paths of the machine.
        facts: how, in words by what they are about.
    """

    verb: str
    command: str
    facts: dict[str, str]


def making(manifest: Mapping[str, Any]) -> list[Making]:
    """Return how a checkpoint was made: how it was pruned, and after that recovered."""
    stages = []
    if "criterion" in manifest:
        # What recovery has of its own, it put in the place of what pruning had.
        own = {**manifest, **(manifest.get("pruned") or {})}
        facts = {**_criterion(manifest), **_calibration(manifest), **_cost(own)}
        stages.append(Making("pruned", _command(own), facts))
    if recovery := manifest.get("recovery"):
        own = {**recovery, **{key: manifest[key] for key in _OF_RUN if key in manifest}}
        stages.append(Making("recovered", _command(own), {**_recovery(recovery), **_cost(own)}))
    return stages or [Making("made", _command(manifest), _cost(manifest))]


# Of the last command, at the top of a manifest.
_OF_RUN = ("command", "created", "versions")


def _command(made: Mapping[str, Any]) -> str:
    return public_command(str(made.get("command") or "not recorded"))


def _criterion(manifest: Mapping[str, Any]) -> dict[str, str]:
    criterion = manifest["criterion"]
    parts = criterion.get("parts", DEFAULT_PARTS)
    channels = channels_in_words(parts)
    of = {
        "ffn": f"{channels} of what stays" if {*parts} - {*UNIT_PARTS} else channels,
        "attention": "attention parameters",
        "blocks": "block parameters",
        "experts": "experts",
        "model": "all parameters",
    }.get(criterion["of"], "?")
    facts = {}
    if goal := manifest.get("goal"):
        name = goal["goal"].replace("_", "-")
        tried = f", {len(goal['tried'])} plans tried" if goal["tried"] else ""
        facts["goal"] = f"--{name} {goal['asked']:g}{tried}"
    facts["asked for"] = f"{criterion['sparsity']:.1%} of {of}"
    facts["blocks by"] = block_metric_in_words(criterion["block_metric"])
    facts["channels by"] = criterion["channel_metric"]
    if any(manifest.get(key) for key in ("removed_blocks", "removed_attentions")):
        facts["removed whole"] = f"those {removal_in_words(criterion.get('removal', ''))}"
    if experts := manifest.get("experts"):
        lost = f"{fmean(experts['lost_output']):.1%} of what all experts add to the hidden states"
        facts["experts by"] = f"{SCORE_IN_WORDS}; those that went added {lost}"
    facts["widths"] = f"multiples of {criterion['multiple']}"
    return facts


def _calibration(manifest: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if calibration := manifest.get("calibration"):
        facts["calibration text"] = texts_in_words(calibration)
        facts["calibration"] = (
            f"{counted(calibration['windows'], 'windows')} of {calibration['seqlen']} tokens, seed "
            f"{calibration['seed']}, {calibration['dtype']} on {calibration['device']}"
        )
    if "repair" in manifest:
        facts["repair"] = steps_in_words(manifest["repair"]["steps"])
    return facts


def _recovery(recovery: Mapping[str, Any]) -> dict[str, str]:
    how, training, teacher = (recovery[key] for key in ("adaptation", "training", "teacher"))
    trained = "all weights of the targeted projections"
    if how["method"] != "full":
        equal = how["allocation"] == "uniform"
        ranks = "equal in all blocks" if equal else f"ranks by {how['allocation']}"
        trained = f"{how['method']} of mean rank {how['rank']:g}, {ranks}"
    facts = {
        "trained": f"{trained}; targets: {how['targets']}; "
        f"{recovery['trainable_parameters']:,} parameters",
        "recovery text": f"{texts_in_words(recovery['data'])} of {training['seqlen']} tokens",
        "training": f"{counted(recovery['steps'], 'steps')} of {recovery['tokens_in_step']:,} "
        f"tokens, {recovery['tokens_per_second']:,.0f} tokens/s, peak learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}",
    }
    if teacher:
        facts["teacher"] = f"{public_name(teacher['name'])}, weight {teacher['weight']:g}"
    return facts


def _cost(made: Mapping[str, Any]) -> dict[str, str]:
    """Return what a command took, with which versions, and when."""
    facts = {}
    if made.get("seconds"):
        facts["time"] = ", ".join(f"{stage} {s:.1f} s" for stage, s in made["seconds"].items())
    if "peak_rss_bytes" in made:
        threads = f", {counted(made['threads'], 'threads')}" if made.get("threads") else ""
        facts["memory"] = f"{made['peak_rss_bytes'] / 2**30:.2f} GiB at its peak{threads}"
    if "versions" in made:
        facts["versions"] = ", ".join(f"{name} {v}" for name, v in made["versions"].items())
    if "created" in made:
        facts["made"] = str(made["created"])
    return facts


def texts_in_words(table: Mapping[str, Any] | None) -> str:
    """Return the texts of a calibration or of training, by their public names."""
    sources = (table or {}).get("sources", {})
    # One by one: two paths may end alike.
    return ", ".join(sources_in_words({public_name(name): n}) for name, n in sources.items())
