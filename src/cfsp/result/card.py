"""The model card (README.md) of a checkpoint: metadata for the hub, and plain words for people."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.experts import SCORE_IN_WORDS
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.card_metadata import card_metadata
from cfsp.result.conditions import Conditions, sources_in_words
from cfsp.result.origin import Origin, public_command, public_name
from cfsp.result.repair_steps import changed_weights, repair_steps, steps_in_words
from cfsp.settings import block_metric_in_words, removal_in_words

_PAPER = "[CFSP, arXiv 2409.13199](https://arxiv.org/abs/2409.13199)"

_LOAD = """\
## How to load it

{why}```python
from transformers import {model}, {reader}

model = {model}.from_pretrained("."{trust})
{name} = {reader}.from_pretrained(".")
```

`"."` is this directory; a path to it, or its name on the hub, does as well.
"""
_WHY_CODE = f"""\
Blocks have different widths, or no attention, so the checkpoint brings a small file of code,
`{MODELING_FILE}`, that builds the stock model with them. `trust_remote_code=True` runs that
file: read it first. Without it, and by an Auto class that the file is not for (such as
`AutoModelForSequenceClassification`), transformers stops with an
`AmbiguousGlobalPerLayerAttributeError: ... is a per-layer attribute and may vary across layers`,
or with a size mismatch that names `ignore_mismatched_sizes`, which would not help.

"""

_VERIFY = """\
## How to verify it

    cfsp verify .

checks weights, config, tokenizer and code against the digests in `cfsp.json`, widths and
parameters against the plan in `cfsp_plan.json`, and that a forward pass gives finite numbers.
`cfsp inspect .` shows how the model was made.
"""

_LIMITS = """\
## Limits

- What the removed channels knew is gone. On text and tasks that are unlike the calibration text,
  the model may have lost more than the numbers here show: measure it on what you use it for.
- Nothing was measured about safety or about following instructions; what holds for the original
  need not hold for this model.
{only_ffns}- A perplexity compares only with one of the same text, windows and first token.
{license}"""


_ONLY_FFNS = """\
- Only FFN channels were removed. Attention and the KV cache are as large as the original's.
"""


def model_card(manifest: dict[str, Any], plan: PruningPlan | None, origin: Origin) -> str:
    """Return the model card of a checkpoint.

    Args:
        manifest: of version 2.
        plan: which channels were removed; None if cfsp removed none.
        origin: the model that it was made from.
    """
    # A pruned model that is pruned again is not made from the original of both.
    made_from = manifest.get("base_model", {}).get("name", origin.name)
    hub_id = origin.hub_id if made_from == origin.name else None
    name = hub_id.partition("@")[0] if hub_id else public_name(made_from)
    sections = [
        f"---\n{card_metadata(manifest, origin, name)}\n---\n",
        _what_it_is(manifest, plan, name, hub_id, origin.base_model),
        _size_table(manifest, plan),
        _quality(manifest),
        _how_to_load(manifest),
        _VERIFY if plan else "",
        _how_it_was_pruned(manifest, plan) if plan else "",
        _how_it_was_recovered(manifest),
        _LIMITS.format(
            license=_license(origin),
            only_ffns="" if plan is not None and plan.has_parts else _ONLY_FFNS,
        ),
        f"## What was removed\n\n{_block_table(plan)}" if plan else "",
    ]
    return "\n".join(section for section in sections if section)


def _what_it_is(
    manifest: dict[str, Any],
    plan: PruningPlan | None,
    name: str,
    hub_id: str | None,
    base_model: str | None,
) -> str:
    link = _link(hub_id) if hub_id else _inline(name)
    if base_model not in (None, name):
        link += f" (which was made from {_link(str(base_model))})"
    acts = [
        act for key, act in (("criterion", "pruned"), ("recovery", "recovered")) if key in manifest
    ]
    lines = [f"# {_plain(name)}, {' and '.join(acts)}", ""]
    if plan is not None and plan.has_gaps:
        lines += [_without_blocks(manifest, plan, link), ""]
    elif "ffn_sparsity" in manifest:
        what = "channels" if _counts_channels(plan) else "parameters"
        experts = _experts_in_words(manifest)
        lines += [
            f"This is {link} without {manifest['ffn_sparsity']:.1%} of its FFN {what}"
            f"{_groups_in_words(manifest)}{f' (without {experts})' if experts else ''}, which are "
            f"{manifest['model_sparsity']:.1%} of all parameters. cfsp removed the weakest of them "
            f"({_PAPER}); what is left is an ordinary dense checkpoint.",
            "",
        ]
    else:
        lines += [f"This is {link}, trained further by cfsp.", ""]
    if dequantised := manifest.get("dequantised"):
        lines += [
            f"The original is stored quantised ({_plain(dequantised['from'])}). These weights are "
            f"dequantised, in {_plain(dequantised['to'])}: each is larger than there until the "
            "model is quantised again.",
            "",
        ]
    return "\n".join([*lines, *_on_which_text(manifest)])


def _without_blocks(manifest: dict[str, Any], plan: PruningPlan, link: str) -> str:
    """Say which blocks or attentions went, and what went of the others."""
    staying = [unit for unit in plan.kept_units if unit.kept]
    # Of experts that go no channel is counted.
    weights = [len(unit.kept_ffns) / unit.ffns * unit.cost for unit in staying]
    kept = sum(unit.kept_width * each for unit, each in zip(staying, weights, strict=True))
    chosen = removal_in_words(plan.criterion.get("removal", ""))
    whole = sum(unit.width * each for unit, each in zip(staying, weights, strict=True))
    channels = 1 - kept / whole
    others = ""
    if channels:
        what = "channels" if _counts_channels(plan) else "parameters"
        others = f", and of the others without {channels:.1%} of their FFN {what} ({_PAPER})"
    experts = _experts_in_words(manifest)
    return (
        f"This is {link} without {plan.removed_in_words}, {chosen}"
        f"{others}{f', and without {experts}' if experts else ''}. That is "
        f"{manifest['model_sparsity']:.1%} of all parameters. What is left is an ordinary dense "
        "checkpoint."
    )


def _on_which_text(manifest: dict[str, Any]) -> list[str]:
    """Say what text made the model, and that its perplexity there flatters it."""
    lines = []
    calibrated = _sources(manifest.get("calibration"))
    if calibrated:
        lines.append(f"- Calibrated on {calibrated}: that text decided what stays.")
    steps = [step for step in repair_steps(manifest) if changed_weights(step)]
    if steps:
        names = ", ".join(step["name"] for step in steps)
        lines.append(
            f"- Repaired on the same text ({names}): the weights that stay were changed so that "
            "blocks compute there what they did before."
        )
    recovery = manifest.get("recovery")
    if recovery:
        lines.append(f"- Recovered: trained on {_sources(recovery['data'])}.")
    if lines:
        lines.append(
            "- So its perplexity on these texts, and on text like them, is **flattering**. Judge "
            "it by text of another kind."
        )
    return [*lines, ""] if lines else []


def _groups_in_words(manifest: dict[str, Any]) -> str:
    """Say which share of KV groups went, if any could."""
    groups = manifest.get("kv_groups")
    return f" and {groups['sparsity']:.1%} of its KV groups" if groups else ""


def _experts_in_words(manifest: dict[str, Any]) -> str:
    """Say how many experts went, if some did, and what these did."""
    experts = manifest.get("experts")
    if not experts:
        return ""
    before, after = experts["before"][0], experts["after"][0]
    return (
        f"{before - after} of the {before} experts of each block, which added "
        f"{fmean(experts['lost_output']):.1%} of what all experts add to the hidden states"
    )


def _counts_channels(plan: PruningPlan | None) -> bool:
    """Return whether the share of FFN channels that went is that of FFN parameters."""
    return plan is None or plan.counts_channels


def _size_table(manifest: dict[str, Any], plan: PruningPlan | None) -> str:
    if "parameters_before" not in manifest:
        return ""
    by_parameters = "" if _counts_channels(plan) else " (removed: by their parameters)"
    return (
        "| | before | after | removed |\n|---|---:|---:|---:|\n"
        f"| parameters | {manifest['parameters_before']:,} | {manifest['parameters_after']:,} "
        f"| {manifest['model_sparsity']:.1%} |\n"
        f"| FFN channels{by_parameters} | {sum(manifest['widths_before']):,} "
        f"| {sum(manifest['intermediate_sizes']):,} | {manifest['ffn_sparsity']:.1%} |\n"
        f"{_row_of(manifest.get('kv_groups'), 'KV groups')}"
        f"{_row_of(manifest.get('experts'), 'experts')}"
    )


def _row_of(part: dict[str, Any] | None, noun: str) -> str:
    if not part:
        return ""
    before, after = sum(part["before"]), sum(part["after"])
    return f"| {noun} | {before:,} | {after:,} | {part['sparsity']:.1%} |\n"


def _quality(manifest: dict[str, Any]) -> str:
    """Return a row for each text and way to measure; only numbers in one row compare."""
    recovery = manifest.get("recovery") or {}
    rows: dict[Conditions, list[str]] = {}
    for column, table in ((0, manifest), (1, recovery)):
        for text, value in (table.get("perplexity") or {}).items():
            cells = rows.setdefault(Conditions.of(text, value), ["", "", ""])
            cells[column], cells[column + 1] = f"{value['before']:.2f}", f"{value['after']:.2f}"
    if not rows:
        return ""
    names = ["dense", "pruned", "recovered"][: 3 if recovery else 2]
    lines = [
        "| perplexity on | " + " | ".join(names) + " | measured on |",
        "|---|" + "---:|" * len(names) + "---|",
    ]
    for conditions, cells in rows.items():
        numbers = " | ".join(cells[: len(names)])
        how = conditions.beside({"the model": manifest})
        lines.append(f"| {_cell(public_name(conditions.text))} | {numbers} | {how} |")
    return "\n".join([*lines, ""])


def _how_to_load(manifest: dict[str, Any]) -> str:
    needs_code = MODELING_FILE in manifest.get("files", {})
    trust = ", trust_remote_code=True" if needs_code else ""
    model = auto_class_of_type(manifest.get("base_model", {}).get("model_type", ""))
    is_causal = model == "AutoModelForCausalLM"
    name, reader = ("tokenizer", "AutoTokenizer") if is_causal else ("processor", "AutoProcessor")
    why = _WHY_CODE if needs_code else ""
    return _LOAD.format(why=why, trust=trust, model=model, name=name, reader=reader)


def _how_it_was_pruned(manifest: dict[str, Any], plan: PruningPlan) -> str:
    made = manifest.get("pruned") or manifest
    calibration = plan.calibration
    packages = ", ".join(f"{name} {v}" for name, v in made["versions"].items())
    lines = [
        "## How it was pruned",
        "",
        f"    {public_command(made['command'])}",
        "",
        f"- calibration text: {_sources(calibration)} of {calibration['seqlen']} tokens, "
        f"seed {calibration['seed']}, in {_inline(calibration['dtype'])} "
        f"on {_inline(calibration['device'])}",
        f"- blocks by {block_metric_in_words(plan.criterion['block_metric'])}, "
        f"channels by {plan.criterion['channel_metric']}, "
        f"widths in multiples of {plan.criterion['multiple']}",
        *([f"- experts by {SCORE_IN_WORDS}"] if plan.kept_experts is not None else []),
        f"- repair: {_plain(steps_in_words(repair_steps(manifest)))}",
        f"- versions: {packages}",
        "- `cfsp.json` holds digests and all conditions, `cfsp_plan.json` the exact channels",
        "",
    ]
    goal = _goal(manifest.get("goal"))
    return "\n".join([*lines, goal] if goal else lines)


_GOALS = {
    "target_params": "to keep {asked:g} of all parameters",
    "target_kv_cache": "to keep {asked:g} of the KV cache",
    "max_loss_increase": "a loss of at most {asked:g} nats per token more than the dense model's, "
    "on held-out text, before repair",
    "target_speedup": "to be {asked:g} times faster, as predicted from latencies",
}
_VALUES = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def _goal(resolution: dict[str, Any] | None) -> str:
    """Say what was asked for instead of a sparsity, and what was tried."""
    if not resolution:
        return ""
    name = resolution["goal"]
    context = resolution["conditions"].get("context")
    tokens = f" of {context:,} tokens" if context else ""
    lines = [f"The goal was {_GOALS[name].format(asked=resolution['asked'])}{tokens}."]
    if "result" in resolution:
        lines.append(f"The finished model's loss is {resolution['result']:+.4f} nats higher.")
    if resolution["tried"]:
        channels = channels_in_words(resolution["chosen"]["parts"])
        what = channels or "parameters that may go"
        lines += ["", f"| {what} removed | parameters | {_VALUES[name]} | fits |"]
        lines += ["|---:|---:|---:|---|"]
        lines += [
            f"| {entry['sparsity']:.1%} | {entry['parameters']:,} | {entry['value']:.4f} "
            f"| {'yes' if entry['fits'] else 'no'} |"
            for entry in resolution["tried"]
        ]
    return "\n".join([*lines, ""])


def _how_it_was_recovered(manifest: dict[str, Any]) -> str:
    recovery = manifest.get("recovery")
    if not recovery:
        return ""
    training, adaptation, teacher = (recovery[key] for key in ("training", "adaptation", "teacher"))
    how = (
        "all weights of the targeted projections"
        if adaptation["method"] == "full"
        else f"{adaptation['method']} of mean rank {adaptation['rank']:g}, "
        f"ranks by {adaptation['allocation']}, merged into the weights"
    )
    lines = [
        "## How it was recovered",
        "",
        f"    {public_command(manifest['command'])}",
        "",
        f"- trained: {how}; targets: {adaptation['targets']}; "
        f"{recovery['trainable_parameters']:,} trainable parameters",
        f"- text: {_sources(recovery['data'])} of {training['seqlen']} tokens",
        f"- {counted(recovery['steps'], 'steps')} of {recovery['tokens_in_step']:,} tokens in "
        f"{recovery['seconds']['train'] / 60:.1f} minutes, peak learning rate "
        f"{training['learning_rate']:g}, seed {training['seed']}",
    ]
    if teacher is not None:
        name = _inline(public_name(teacher["name"]))
        how = f"weight {teacher['weight']:g}, temperature {teacher['temperature']:g}"
        lines.append(f"- distilled from {name}, {how}")
    return "\n".join([*lines, ""])


def _license(origin: Origin) -> str:
    name = origin.metadata.get("license")
    known = f" ({_inline(str(name))})" if name else ""
    return f"- It is made from another model, so the license of that model{known} applies.\n"


def _block_table(plan: PruningPlan) -> str:
    rows = [
        f"| {unit.name} | {unit.distance:.4f} | {unit.importance:.3f} | {unit.width} "
        f"| {unit.kept_in_words} |"
        for unit in plan.units
    ]
    head = "| block | distance | importance | channels before | after |\n|---:|---:|---:|---:|---:|"
    return "\n".join([head, *rows, ""])


def _sources(table: dict[str, Any] | None) -> str:
    sources: dict[str, int] = (table or {}).get("sources", {})
    # One by one: two paths may end alike.
    each = (sources_in_words({_inline(public_name(name)): n}) for name, n in sources.items())
    return ", ".join(each)


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id.replace('@', '/tree/')})"


def _inline(text: str) -> str:
    """Quote foreign text in Markdown so that it can neither format nor script the page."""
    return "`" + _one_line(text).replace("`", "'") + "`"


def _plain(text: str) -> str:
    """Return foreign text without what Markdown and HTML would read as more than text."""
    return "".join(c if c.isalnum() or c in " ./-_,()" else "?" for c in _one_line(text))


def _cell(text: str) -> str:
    """Quote foreign text within a table, where a bar ends the cell even in code."""
    return _inline(text).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
