"""A model that returns no more than logits while only a part of it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What else a config can ask for. It is collected from all blocks, and one that does not run gives
# none: mixtures of experts that were fine-tuned often ask for router logits.
_MORE = ("output_router_logits", "output_hidden_states", "output_attentions")


@contextmanager
def logits_only(model: PreTrainedModel) -> Iterator[None]:
    """Let a model return nothing but logits while this is open, whatever its config asks for."""
    asked = _asked(model.config)
    for config, name in asked:
        setattr(config, name, False)
    try:
        yield
    finally:
        for config, name in asked:
            setattr(config, name, True)


def _asked(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str]]:
    configs = (config, *(getattr(config, name, None) for name in config.sub_configs))
    return [(each, name) for each in configs for name in _MORE if getattr(each, name, False)]
