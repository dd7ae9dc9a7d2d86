"""The config of a pruned model: without blocks and experts that go, with the widths that stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.architecture.expert_proof import config_with_experts
from cfsp.checkpoint.config_blocks import fields_without_blocks, stock_without_blocks
from cfsp.checkpoint.config_widths import config_with_widths, fields_and_file, stock_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp.architecture.found import Architecture
    from cfsp.checkpoint.modeling_code import ModelingFile


def pruned_config(
    config: PreTrainedConfig,
    architecture: Architecture,
    removed: Collection[int],
    widths: Sequence[int],
    experts: int | None,
) -> PreTrainedConfig:
    """Return the config of the pruned model, of the class that the source's config has.

    Args:
        config: the source's; stays as it is.
        architecture: of the source.
        removed: indices of the blocks that go.
        widths: of every FFN unit of the blocks that stay.
        experts: how many routed experts of each block stay; None for all.

    Raises:
        UnsupportedModelError: no config of the class builds the blocks that stay as they are.
    """
    config, architecture, _ = _smaller(config, architecture, removed, experts)
    return config_with_widths(config, architecture, widths)


def pruned_fields_and_file(
    fields: dict[str, Any],
    config: PreTrainedConfig,
    architecture: Architecture,
    removed: Collection[int],
    widths: Sequence[int],
    experts: int | None,
) -> tuple[dict[str, Any], ModelingFile | None]:
    """Return config.json of the pruned model, and the modelling file if it needs one.

    Arguments beside `fields`, the source's config.json, are those of `pruned_config`, which fails
    as this does.
    """
    smaller, architecture, changes = _smaller(config, architecture, removed, experts)
    if changes:
        fields = fields_without_blocks(fields, config, changes)
    return fields_and_file(fields, smaller, architecture, widths)


def _smaller(
    config: PreTrainedConfig,
    architecture: Architecture,
    removed: Collection[int],
    experts: int | None,
) -> tuple[PreTrainedConfig, Architecture, dict[str, Any]]:
    """Return config and architecture of what stays whole, and what changed in the config."""
    changes: dict[str, Any] = {}
    if removed:
        config, architecture, changes = stock_without_blocks(
            stock_config(config), architecture, removed
        )
    if experts is not None:
        assert architecture.experts is not None
        key = architecture.experts.key
        config = config_with_experts(config, key, experts)
        architecture = architecture.with_experts(experts)
        changes |= {key: experts}
    return config, architecture, changes
