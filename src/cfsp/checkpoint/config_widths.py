"""The one rule for widths in a config: of config.json, and of a config object in memory.

Equal widths give the plain stock config. Different widths give `per_layer_config`, the schema that
transformers reads from 5.15 on, and point at the modelling file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.families import Family, family_of
from cfsp.checkpoint.modeling_code import auto_map

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# In the config of a model that was pruned in memory: what a manifest says of one in files.
PRUNED_KEY = "cfsp"


def fields_with_widths(
    fields: dict[str, Any], family: Family, widths: Sequence[int]
) -> dict[str, Any]:
    """Return config.json of the pruned model, made from that of its source.

    Args:
        fields: the source's config.json; stays as it is.
        family: its family.
        widths: FFN channels of every block.
    """
    changes = _changes(family, widths)
    # First without: the order of what stays is that of the source.
    kept = {k: v for k, v in fields.items() if changes.get(k, v) is not None or v is None}
    return kept | {key: value for key, value in changes.items() if value is not None}


def config_with_widths(config: PreTrainedConfig, widths: Sequence[int]) -> PreTrainedConfig:
    """Return the config of the pruned model, of the class that the source's config has.

    Args:
        config: the source's; stays as it is.
        widths: FFN channels of every block.
    """
    changed = copy.deepcopy(config)
    changes = _changes(family_of(config), widths)
    # Last of all: it makes a config for every block out of the whole.
    per_layer = changes.pop("per_layer_config")
    changed.per_layer_config = None
    for key, value in changes.items():
        if value is not None:
            setattr(changed, key, value)
        elif hasattr(changed, key):
            delattr(changed, key)
    changed.per_layer_config = per_layer
    return changed


def _changes(family: Family, widths: Sequence[int]) -> dict[str, Any]:
    """Return what the widths say of each key of a config; None where it must not be there."""
    differ = len(set(widths)) > 1
    digits = len(str(len(widths) - 1))
    return {
        family.width_key: max(widths),
        "architectures": [f"Pruned{family.causal_lm}" if differ else family.causal_lm],
        "per_layer_config": {
            str(block).zfill(digits): {family.width_key: width}
            for block, width in enumerate(widths)
        }
        if differ
        else None,
        "auto_map": auto_map(family) if differ else None,
        PRUNED_KEY: None,
    }
