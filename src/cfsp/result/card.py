"""The README.md of a pruned checkpoint."""

from __future__ import annotations

from typing import Any

from cfsp.checkpoint.modeling_code import MODELING_FILE
from cfsp.planning.coarse import block_metric_in_words
from cfsp.planning.plan_file import PruningPlan

_LOAD_WITH_CODE = """\
Blocks have different widths, or biases that the stock class lacks, so the checkpoint brings a small
modelling file (`modeling_cfsp.py`, 40 lines) that builds the stock model with them:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""

_LOAD_PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


def model_card(manifest: dict[str, Any], plan: PruningPlan) -> str:
    """Return the model card of a checkpoint, from its manifest and plan."""
    base = _inline(plan.model.name)
    plain = MODELING_FILE not in manifest["files"]
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- cfsp\n- pruned\n---\n",
        f"# {base}, pruned by CFSP\n",
        f"Made from {base} by structured pruning of FFN channels "
        "([CFSP, arXiv 2409.13199](https://arxiv.org/abs/2409.13199)): the weakest channels were "
        "removed, so the model is smaller and an ordinary dense checkpoint.\n",
        _size_table(manifest),
        _quality_table(manifest),
        "## How to load\n",
        _LOAD_PLAIN if plain else _LOAD_WITH_CODE,
        "## How it was made\n",
        f"    {_one_line(manifest['command'])}\n",
        _conditions(manifest, plan),
        _goal(manifest.get("goal")),
        "## What was removed\n",
        _block_table(plan),
    ]
    return "\n".join(section for section in sections if section)


def _size_table(manifest: dict[str, Any]) -> str:
    return (
        "| | before | after | removed |\n|---|---:|---:|---:|\n"
        f"| parameters | {manifest['parameters_before']:,} | {manifest['parameters_after']:,} "
        f"| {manifest['model_sparsity']:.1%} |\n"
        f"| FFN channels | {sum(manifest['widths_before']):,} "
        f"| {sum(manifest['intermediate_sizes']):,} | {manifest['ffn_sparsity']:.1%} |\n"
    )


def _quality_table(manifest: dict[str, Any]) -> str:
    if not manifest["perplexity"]:
        return ""
    rows = [
        f"| {_cell(text)} | {value['before']:.2f} | {value['after']:.2f} | {value['tokens']:,} |"
        for text, value in manifest["perplexity"].items()
    ]
    head = "| perplexity on | before | after | tokens |\n|---|---:|---:|---:|"
    return "\n".join([head, *rows, ""])


def _conditions(manifest: dict[str, Any], plan: PruningPlan) -> str:
    calibration = plan.calibration
    texts = ", ".join(f"{_inline(n)} ({c} windows)" for n, c in calibration["sources"].items())
    packages = ", ".join(f"{name} {v}" for name, v in manifest["versions"].items())
    return (
        f"- calibration text: {texts} of {calibration['seqlen']} tokens, "
        f"seed {calibration['seed']}, in {_inline(calibration['dtype'])} "
        f"on {_inline(calibration['device'])}\n"
        f"- blocks by {block_metric_in_words(plan.criterion['block_metric'])}, "
        f"channels by {plan.criterion['channel_metric']}, "
        f"widths in multiples of {plan.criterion['multiple']}\n"
        f"- versions: {packages}\n"
        "- `cfsp.json` holds digests and all conditions, `cfsp_plan.json` the exact channels\n"
    )


_GOALS = {
    "target_params": "to keep {asked:g} of all parameters",
    "max_loss_increase": "a loss of at most {asked:g} nats per token more than the dense model's, "
    "on held-out text, before restoration",
    "target_speedup": "to be {asked:g} times faster, as predicted from latencies",
}
_VALUES = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def _goal(resolution: dict[str, Any] | None) -> str:
    """Say what was asked for instead of a sparsity, and what was tried."""
    if not resolution:
        return ""
    name = resolution["goal"]
    lines = [f"The goal was {_GOALS[name].format(asked=resolution['asked'])}."]
    if "result" in resolution:
        lines.append(f"The finished model's loss is {resolution['result']:+.4f} nats higher.")
    if resolution["tried"]:
        lines += ["", f"| FFN channels removed | parameters | {_VALUES[name]} | fits |"]
        lines += ["|---:|---:|---:|---|"]
        lines += [
            f"| {entry['sparsity']:.1%} | {entry['parameters']:,} | {entry['value']:.4f} "
            f"| {'yes' if entry['fits'] else 'no'} |"
            for entry in resolution["tried"]
        ]
    return "\n".join([*lines, ""])


def _block_table(plan: PruningPlan) -> str:
    rows = [
        f"| {i} | {block.distance:.4f} | {block.importance:.3f} | {block.width} "
        f"| {block.kept_width} |"
        for i, block in enumerate(plan.blocks)
    ]
    head = "| block | distance | importance | channels before | after |\n|---:|---:|---:|---:|---:|"
    return "\n".join([head, *rows, ""])


def _inline(text: str) -> str:
    """Quote foreign text in Markdown so that it can neither format nor script the page."""
    return "`" + _one_line(text).replace("`", "'") + "`"


def _cell(text: str) -> str:
    """Quote foreign text within a table, where a bar ends the cell even in code."""
    return _inline(text).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
