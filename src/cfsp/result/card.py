"""The model card (README.md) of a checkpoint: metadata for the hub, and plain words for people."""

from __future__ import annotations

from typing import Any

from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.card_metadata import card_metadata
from cfsp.result.conditions import perplexities
from cfsp.result.facts import size_facts, what_went
from cfsp.result.loading import load_code, needs_code
from cfsp.result.making import Making, making, texts_in_words
from cfsp.result.names import public_name
from cfsp.result.origin import Origin
from cfsp.result.repair_steps import changed_weights, repair_steps

_PAPER = "[CFSP, arXiv 2409.13199](https://arxiv.org/abs/2409.13199)"

_LOAD = """\
## How to load it

{why}```python
{code}
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
    stages = making(manifest)
    link = _link(hub_id) if hub_id else _code(name)
    if origin.base_model not in (None, name):
        link += f" (which was made from {_link(str(origin.base_model))})"
    why = _WHY_CODE if needs_code(manifest) else ""
    only_ffns = "" if plan is not None and plan.has_parts else _ONLY_FFNS
    sections = [
        f"---\n{card_metadata(manifest, origin, name)}\n---\n",
        f"# {_plain(name)}, {' and '.join(stage.verb for stage in stages)}\n",
        _what_it_is(manifest, plan, link),
        _on_which_text(manifest),
        _size_table(manifest),
        _quality(manifest),
        _LOAD.format(why=why, code=load_code(manifest, ".")),
        _VERIFY if plan else "",
        *map(_how_it_was_made, stages),
        _goal(manifest.get("goal")),
        _LIMITS.format(license=_license(origin), only_ffns=only_ffns),
        f"## What was removed\n\n{_block_table(plan)}" if plan else "",
    ]
    return "\n".join(section for section in sections if section)


def _what_it_is(manifest: dict[str, Any], plan: PruningPlan | None, link: str) -> str:
    said = f"This is {link}, trained further by cfsp.\n"
    if "ffn_sparsity" in manifest:
        went = what_went(manifest, by_channels=plan is None or plan.counts_channels)
        said = (
            f"This is {link} without {went}. cfsp removed the weakest ({_PAPER}); what is left is "
            "an ordinary dense checkpoint.\n"
        )
    if dequantised := manifest.get("dequantised"):
        said += (
            f"\nThe original is stored quantised ({_plain(dequantised['from'])}). These weights "
            f"are dequantised, in {_plain(dequantised['to'])}: each is larger than there until the "
            "model is quantised again.\n"
        )
    return said


def _on_which_text(manifest: dict[str, Any]) -> str:
    """Say what text made the model, and that its perplexity there flatters it."""
    lines = []
    if calibrated := texts_in_words(manifest.get("calibration")):
        lines.append(f"- Calibrated on {_quoted(calibrated)}: that text decided what stays.")
    if steps := [step["name"] for step in repair_steps(manifest) if changed_weights(step)]:
        lines.append(
            f"- Repaired on the same text ({', '.join(steps)}): the weights that stay were changed "
            "so that blocks compute there what they did before."
        )
    if recovery := manifest.get("recovery"):
        lines.append(f"- Recovered: trained on {_quoted(texts_in_words(recovery['data']))}.")
    if lines:
        lines.append(
            "- So its perplexity on these texts, and on text like them, is **flattering**. Judge "
            "it by text of another kind.\n"
        )
    return "\n".join(lines)


def _size_table(manifest: dict[str, Any]) -> str:
    rows = [
        f"| {fact.name}{f' ({fact.detail})' if fact.detail else ''} | {' | '.join(fact.row)} |"
        for fact in size_facts(manifest)
    ]
    head = ["| | before | after | change |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _quality(manifest: dict[str, Any]) -> str:
    """Return a row for each text and way to measure; only numbers in one row compare."""
    measured = perplexities(manifest)
    models = ["dense", "pruned", *(["recovered"] if manifest.get("recovery") else [])]
    lines = [
        f"| perplexity on | {' | '.join(models)} | measured on |",
        f"|---|{'---:|' * len(models)}---|",
    ]
    for conditions, of in measured.items():
        numbers = " | ".join(f"{of[name]:.2f}" if name in of else "" for name in models)
        how = conditions.beside({"the model": manifest})
        lines.append(f"| {_cell(public_name(conditions.text))} | {numbers} | {how} |")
    return "\n".join([*lines, ""]) if measured else ""


def _how_it_was_made(stage: Making) -> str:
    facts = [f"- {name}: {_quoted(value)}" for name, value in stage.facts.items()]
    return "\n".join([f"## How it was {stage.verb}", "", f"    {stage.command}", "", *facts, ""])


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


def _license(origin: Origin) -> str:
    name = origin.metadata.get("license")
    known = f" ({_code(str(name))})" if name else ""
    return f"- It is made from another model, so the license of that model{known} applies.\n"


def _block_table(plan: PruningPlan) -> str:
    rows = [
        f"| {unit.name} | {unit.distance:.4f} | {unit.importance:.3f} | {unit.width} "
        f"| {unit.kept_in_words} |"
        for unit in plan.units
    ]
    head = "| block | distance | importance | channels before | after |\n|---:|---:|---:|---:|---:|"
    return "\n".join([head, *rows, ""])


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id.replace('@', '/tree/')})"


def _code(text: str) -> str:
    """Quote foreign text in Markdown so that it can neither format nor script the page."""
    return "`" + _one_line(text).replace("`", "'") + "`"


def _quoted(text: str) -> str:
    """Return foreign text as it is where it is plain, else quoted."""
    return text if text == _plain(text) else _code(text)


def _plain(text: str) -> str:
    """Return foreign text without what Markdown and HTML would read as more than text."""
    return "".join(c if c.isalnum() or c in " ./-_,()" else "?" for c in _one_line(text))


def _cell(text: str) -> str:
    """Quote foreign text within a table, where a bar ends the cell even in code."""
    return _code(text).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
