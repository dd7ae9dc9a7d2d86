"""The config of a pruned model: without the blocks that go, with the widths that stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.config_blocks import (
    changes_without_blocks,
    config_without_blocks,
    fields_without_blocks,
)
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
) -> PreTrainedConfig:
    """Return the config of the pruned model, of the class that the source's config has.

    Args:
        config: the source's; stays as it is.
        architecture: of the source.
        removed: indices of the blocks that go.
        widths: of every FFN unit of the blocks that stay.

    Raises:
        UnsupportedModelError: no config of the class builds the blocks that stay as they are.
    """
    config, architecture, _ = _without_blocks(config, architecture, removed)
    return config_with_widths(config, architecture, widths)


def pruned_fields_and_file(
    fields: dict[str, Any],
    config: PreTrainedConfig,
    architecture: Architecture,
    removed: Collection[int],
    widths: Sequence[int],
) -> tuple[dict[str, Any], ModelingFile | None]:
    """Return config.json of the pruned model, and the modelling file if it needs one.

    Args:
        fields: the source's config.json; stays as it is.
        config: the same, as an object.
        architecture: of the source.
        removed: indices of the blocks that go.
        widths: of every FFN unit of the blocks that stay.

    Raises:
        UnsupportedModelError: no config of the class builds the blocks that stay as they are.
    """
    shorter, architecture, changes = _without_blocks(config, architecture, removed)
    if removed:
        fields = fields_without_blocks(fields, config, changes)
    return fields_and_file(fields, shorter, architecture, widths)


def _without_blocks(
    config: PreTrainedConfig, architecture: Architecture, removed: Collection[int]
) -> tuple[PreTrainedConfig, Architecture, dict[str, Any]]:
    """Return config and architecture of the blocks that stay, and what changed in the config."""
    if not removed:
        return config, architecture, {}
    stock = stock_config(config)
    changes = changes_without_blocks(stock, removed)
    return config_without_blocks(stock, changes), architecture.without_blocks(removed), changes
