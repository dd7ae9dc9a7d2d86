"""How a run was made and how to load it, as text to copy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.planning.allocation import channels_in_words
from cfsp.result.conditions import sources_in_words
from cfsp.result.repair_steps import repair_steps, steps_in_words
from cfsp.result.runs import RunFacts
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, block_metric_in_words


@dataclass(frozen=True)
class Reproduction:
    """What the page says about the making of one run.

    Attributes:
        name: the run.
        commands: what the user typed, in this order.
        load: Python that loads the result; empty where its weights were not kept.
        conditions: name and value.
        manifest: the manifest, indented JSON.
    """

    name: str
    commands: list[str]
    load: str
    conditions: list[tuple[str, str]]
    manifest: str


def reproduction(run: RunFacts) -> Reproduction:
    """Return how a run was made, from its manifest."""
    return Reproduction(
        run.name,
        _commands(run.manifest),
        _load_code(run),
        _conditions(run.manifest),
        json.dumps(run.manifest, indent=2, ensure_ascii=False),
    )


def _commands(manifest: dict[str, Any]) -> list[str]:
    """Return the commands: a recovered run was pruned by one before."""
    both = (manifest.get("pruned") or {}).get("command"), manifest.get("command")
    return [str(command) for command in both if command] or ["not recorded"]


def _load_code(run: RunFacts) -> str:
    """Return Python that loads a run; what stock cannot build needs the modelling file."""
    if not run.weight_bytes:
        return ""
    widths = set(run.manifest.get("intermediate_sizes", []))
    has_code = len(widths) > 1 or MODELING_FILE in run.manifest.get("files", {})
    trust = ", trust_remote_code=True" if has_code else ""
    where = repr(str(run.directory))
    auto_class = auto_class_of_type(run.manifest.get("base_model", {}).get("model_type", ""))
    return (
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f"model = {auto_class}.from_pretrained({where}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})"
    )


def _conditions(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    criterion = manifest.get("criterion")
    if criterion:
        parts = criterion.get("parts", DEFAULT_PARTS)
        channels = channels_in_words(parts)
        of = {
            "ffn": f"{channels} of what stays" if {*parts} - {*UNIT_PARTS} else channels,
            "attention": "attention parameters",
            "blocks": "block parameters",
            "experts": "experts",
            "model": "all parameters",
        }.get(criterion["of"], "?")
        lines += [
            ("asked for", f"{criterion['sparsity']:.1%} of {of}"),
            ("blocks by", block_metric_in_words(criterion["block_metric"])),
            ("channels by", str(criterion["channel_metric"])),
            *([("removed blocks by", str(criterion["removal"]))] if "removal" in criterion else []),
            ("widths", f"multiples of {criterion['multiple']}"),
        ]
    if goal := manifest.get("goal"):
        name = goal["goal"].replace("_", "-")
        lines.insert(0, ("goal", f"--{name} {goal['asked']:g}, {len(goal['tried'])} plans tried"))
    calibration = manifest.get("calibration")
    if calibration:
        windows = counted(calibration["windows"], "windows")
        lines += [
            ("calibration text", sources_in_words(calibration["sources"])),
            (
                "calibration",
                f"{windows} of {calibration['seqlen']} tokens, seed "
                f"{calibration['seed']}, {calibration['dtype']} on {calibration['device']}",
            ),
        ]
    if "repair" in manifest:
        lines.append(("repair", steps_in_words(repair_steps(manifest))))
    recovery = manifest.get("recovery")
    if recovery:
        how = recovery["adaptation"]
        method = f"{how['method']}, targets {how['targets']}"
        if how["method"] != "full":
            method += f", mean rank {how['rank']:g} by {how['allocation']}"
        texts = sources_in_words(recovery["data"]["sources"])
        length = (
            f"{counted(recovery['steps'], 'steps')} of {recovery['tokens_in_step']:,} tokens, "
            f"{recovery['tokens_per_second']:,.0f} tokens/s"
        )
        lines += [("recovery", method), ("recovery text", texts), ("training", length)]
    if manifest.get("seconds"):
        times = ", ".join(f"{stage} {value:.1f} s" for stage, value in manifest["seconds"].items())
        lines.append(("time", times))
    if "peak_rss_bytes" in manifest:
        count = manifest.get("threads", 0)
        threads = f", {counted(count, 'threads')}" if count else ""
        lines.append(
            ("memory", f"{manifest['peak_rss_bytes'] / 2**30:.2f} GiB at its peak{threads}")
        )
    if "versions" in manifest:
        versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
        lines.append(("versions", versions))
    if "created" in manifest:
        lines.append(("made", str(manifest["created"])))
    return lines
