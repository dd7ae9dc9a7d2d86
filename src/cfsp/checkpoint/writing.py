"""Everything of a pruned checkpoint but its weights: config, code, tokenizer and the like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.checkpoint.config_file import CONFIG_FILE
from cfsp.checkpoint.families import Family
from cfsp.checkpoint.modeling_code import DOWN_BIAS_KEY, MODELING_FILE, auto_map, modeling_code
from cfsp.checkpoint.own_files import CARD_FILE, MANIFEST_FILE, PLAN_FILE

_TRAVELLING_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_TRAVELLING_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_OURS = {CONFIG_FILE, MANIFEST_FILE, PLAN_FILE, CARD_FILE}


def pruned_config(
    fields: dict[str, Any], family: Family, widths: Sequence[int], *, adds_bias: bool = False
) -> dict[str, Any]:
    """Return config.json of the pruned model, made from that of its source.

    Equal widths without an added bias give the plain stock config. Different widths give
    `per_layer_config`, the schema that transformers reads from 5.15 on, and point at the modelling
    file; so does an added bias.

    Args:
        fields: the source's config.json.
        family: its family.
        widths: FFN channels of every block.
        adds_bias: whether the down projections get a bias that the source has not.
    """
    fields = {k: v for k, v in fields.items() if k not in ("per_layer_config", "auto_map")}
    fields[family.width_key] = max(widths)
    fields["architectures"] = [family.causal_lm]
    if len(set(widths)) > 1:
        digits = len(str(len(widths) - 1))
        fields["per_layer_config"] = {
            str(block).zfill(digits): {family.width_key: width}
            for block, width in enumerate(widths)
        }
    if adds_bias:
        fields[DOWN_BIAS_KEY] = True
    if len(set(widths)) > 1 or fields.get(DOWN_BIAS_KEY):
        fields["auto_map"] = auto_map(family)
        fields["architectures"] = [f"Pruned{family.causal_lm}"]
    return fields


def write_config(
    source_directory: Path,
    target: Path,
    family: Family,
    widths: Sequence[int],
    *,
    adds_bias: bool = False,
) -> None:
    """Write config.json of the pruned model, and its modelling file if it needs one."""
    fields = json.loads((source_directory / CONFIG_FILE).read_text(encoding="utf-8"))
    pruned = pruned_config(fields, family, widths, adds_bias=adds_bias)
    (target / CONFIG_FILE).write_text(json.dumps(pruned, indent=2) + "\n", encoding="utf-8")
    if "auto_map" in pruned:
        code = modeling_code(family, bool(pruned.get(DOWN_BIAS_KEY)))
        (target / MODELING_FILE).write_text(code, encoding="utf-8")


def copy_travelling_files(source_directory: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence to the new checkpoint."""
    for path in sorted(source_directory.iterdir()):
        travels = path.suffix in _TRAVELLING_SUFFIXES or path.name.startswith(_TRAVELLING_NAMES)
        if path.name in _OURS or path.name.endswith(".index.json"):
            continue
        if travels and path.is_file():
            shutil.copyfile(path, target / path.name)
