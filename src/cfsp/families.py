"""Model families as data: where each keeps its blocks and which weights share the FFN axis.

A new family is one entry here and one tiny model in tests/tiny_models.py. No other module
asks for a model type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """The names that one model family uses for its decoder blocks and FFN matrices.

    Attributes:
        model_type: `model_type` in config.json.
        causal_lm: transformers class with the language-model head.
        base_model: transformers class without it.
        blocks: dotted path from the causal LM to the list of decoder blocks.
        mlp: attribute of a block that holds the FFN.
        gate: attribute of the FFN; rows are channels; None in an FFN without a gate.
        up: attribute of the FFN; rows are channels.
        down: attribute of the FFN; columns are channels.
        width_key: key in config.json that names the number of channels.
    """

    model_type: str
    causal_lm: str
    base_model: str
    blocks: str = "model.layers"
    mlp: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    width_key: str = "intermediate_size"

    @cached_property
    def _ffn_tensor(self) -> re.Pattern[str]:
        inputs = "|".join(name for name in (self.gate, self.up) if name)
        return re.compile(
            rf"^{re.escape(self.blocks)}\.(?P<block>\d+)\.{re.escape(self.mlp)}\."
            rf"(?:(?P<input>{inputs})\.(?:weight|bias)|(?P<output>{self.down})\.weight)$"
        )

    def channel_axis(self, tensor_name: str) -> tuple[int, int] | None:
        """Return (block, axis of the channels) of an FFN tensor; None of any other tensor.

        The bias of the down projection belongs to the hidden size and has no channel axis.
        """
        match = self._ffn_tensor.match(tensor_name)
        if match is None:
            return None
        return int(match["block"]), 0 if match["input"] else 1

    def block_prefix(self, block: int) -> str:
        """Return what the names of all tensors of one block begin with."""
        return f"{self.blocks}.{block}."

    def weight_name(self, block: int, matrix: str) -> str:
        """Return the tensor name of one FFN matrix (`self.gate`, `self.up` or `self.down`)."""
        return f"{self.blocks}.{block}.{self.mlp}.{matrix}.weight"

    @property
    def blocks_in_base_model(self) -> str:
        """Dotted path from the base model (without head) to the list of blocks."""
        return self.blocks.split(".", 1)[1]


_TABLE = (
    Family("llama", "LlamaForCausalLM", "LlamaModel"),
    Family("mistral", "MistralForCausalLM", "MistralModel"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Model"),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Model"),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}


def family_of_type(model_type: str) -> Family:
    """Return the family with this `model_type`.

    Raises:
        UnsupportedModelError: the model type is not in the table.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; "
            f"supported are: {', '.join(sorted(FAMILIES))}"
        )
    return family


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model config; see `family_of_type`."""
    return family_of_type(config.model_type)


def intermediate_sizes(config: PreTrainedConfig) -> list[int]:
    """Return the number of FFN channels of every block, also of an already pruned model."""
    width_key = family_of(config).width_key
    return [int(getattr(block_config, width_key)) for block_config in config.per_layer_config]
