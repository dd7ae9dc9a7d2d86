"""Model families as data: where each keeps its blocks and which weights share the FFN axis.

A new family is one entry here and one tiny model in tests/tiny_models.py. No other module
asks for a model type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from cfsp.architecture.found import Architecture
    from cfsp.checkpoint.channel_layout import ChannelLayout


@dataclass(frozen=True)
class Experts:
    """How a family with several FFNs in a block (mixture of experts) keeps them.

    In memory a module holds all experts of a block in two parameters: `gate_up_proj` (experts x
    two widths x hidden) and `down_proj` (experts x hidden x width). A checkpoint stores every
    matrix of every expert by itself; `cfsp.checkpoint.expert_tensors` goes between the two.

    Attributes:
        count_key: key in config.json that names the number of experts in a block.
        stored_mlp: what a checkpoint calls the block's `mlp`.
    """

    count_key: str
    stored_mlp: str = "mlp"


@dataclass(frozen=True)
class Family:
    """The names that one model family uses for its decoder blocks and FFN matrices.

    Attributes:
        model_type: `model_type` in config.json.
        causal_lm: transformers class with the language-model head.
        base_model: transformers class without it.
        blocks: dotted path from the causal LM to the list of decoder blocks.
        mlp: attribute of a block that holds the FFN; None if the block itself does.
        gate: attribute of the FFN; None in an FFN without a gate; the same as `up` where both
            are one matrix, with all rows of the gate first.
        up: attribute of the FFN whose outputs are channels.
        down: attribute of the FFN whose inputs are channels.
        inputs_first: whether weights are stored inputs x outputs (`Conv1D`), not outputs x
            inputs (`nn.Linear`).
        width_key: key in config.json that names the number of channels.
        default_expansion: channels per hidden unit where the config leaves that key empty.
        ffn_arguments: what the FFN's class is constructed with, as code of the modelling file,
            where `config` has the width of one block and `width` is it.
        learns_positions: whether there is an embedding of every position, so that no text can be
            longer than that.
        stale: endings of the names of tensors that old checkpoints store and no model reads.
        experts: how it keeps several FFNs in a block; None if a block has one. `gate`, `up` and
            `down` are then what a checkpoint calls the matrices of one expert.
    """

    model_type: str
    causal_lm: str
    base_model: str
    blocks: str = "model.layers"
    mlp: str | None = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    inputs_first: bool = False
    width_key: str = "intermediate_size"
    default_expansion: int = 4
    ffn_arguments: str = "config"
    learns_positions: bool = False
    stale: tuple[str, ...] = (".rotary_emb.inv_freq",)
    experts: Experts | None = None

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the FFN's matrices, each once, the down projection last."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name))

    @property
    def ffn_kind(self) -> str:
        """The FFN in a few words, for people."""
        if self.gate is None:
            kind = f"{self.up}, {self.down}"
        elif self.is_fused:
            kind = f"gated, {self.up} (fused), {self.down}"
        else:
            kind = f"gated, {self.gate}, {self.up}, {self.down}"
        if self.experts is not None:
            kind = f"experts, {kind}"
        return f"{kind}; inputs first" if self.inputs_first else kind

    @cached_property
    def _ffn_tensor(self) -> re.Pattern[str]:
        inputs = "|".join(self.matrices[:-1])
        path = re.escape(self.path_in_block("")).replace(re.escape("*"), r"(?P<ffn>\d+)")
        return re.compile(
            rf"^{re.escape(self.blocks)}\.(?P<block>\d+)\.{path}"
            rf"(?:(?P<input>{inputs})\.(?P<kind>weight|bias)|(?P<output>{self.down})\.weight)$"
        )

    def layout_of(self, tensor_name: str) -> ChannelLayout | None:
        """Return where an FFN tensor keeps its channels; None of any other tensor.

        The bias of the down projection belongs to the hidden size and has no channels.
        """
        from cfsp.checkpoint.channel_layout import (
            ChannelLayout,  # here: the table alone needs no torch
        )

        match = self._ffn_tensor.match(tensor_name)
        if match is None:
            return None
        block = int(match["block"])
        ffn = int(match["ffn"]) if self.experts else 0
        if match["output"]:
            return ChannelLayout(block, 0 if self.inputs_first else 1, ffn=ffn)
        is_matrix = match["kind"] == "weight"
        axis = 1 if is_matrix and self.inputs_first else 0
        return ChannelLayout(block, axis, 2 if self.is_fused else 1, ffn)

    def ffn_count(self, config: PreTrainedConfig) -> int:
        """Return how many FFNs a block has: the number of its experts, or 1."""
        return int(getattr(config, self.experts.count_key)) if self.experts else 1

    def block_prefix(self, block: int) -> str:
        """Return what the names of all tensors of one block begin with."""
        return f"{self.blocks}.{block}."

    def path_in_block(self, matrix: str) -> str:
        """Return the dotted path from a block to one FFN matrix; `*` stands for any expert."""
        if self.experts is not None:
            return f"{self.experts.stored_mlp}.experts.*.{matrix}"
        return f"{self.mlp}.{matrix}" if self.mlp else matrix

    def weight_name(self, block: int, matrix: str, ffn: int = 0) -> str:
        """Return the tensor name of one FFN matrix (one of `matrices`) of one FFN of a block."""
        path = self.path_in_block(matrix).replace("*", str(ffn))
        return f"{self.block_prefix(block)}{path}.weight"

    def down_bias_name(self, block: int) -> str:
        """Return the tensor name of the bias of a block's down projection, whether it has one."""
        return self.weight_name(block, self.down).removesuffix("weight") + "bias"

    def transposed(self, weight: Tensor) -> Tensor:
        """Return a stored matrix as outputs x inputs, or such a matrix as it is stored."""
        return weight.T if self.inputs_first else weight

    @property
    def base_prefix(self) -> str:
        """What the base model is called in the causal LM."""
        return self.blocks.split(".", 1)[0]

    @property
    def blocks_in_base_model(self) -> str:
        """Dotted path from the base model (without head) to the list of blocks."""
        return self.blocks.split(".", 1)[1]


_TABLE = (
    Family("llama", "LlamaForCausalLM", "LlamaModel"),
    Family("mistral", "MistralForCausalLM", "MistralModel"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Model"),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Model"),
    Family("gemma", "GemmaForCausalLM", "GemmaModel"),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Model"),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextModel"),
    Family("olmo2", "Olmo2ForCausalLM", "Olmo2Model"),
    Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3Model"),
    Family("granite", "GraniteForCausalLM", "GraniteModel"),
    Family("stablelm", "StableLmForCausalLM", "StableLmModel"),
    Family("phi3", "Phi3ForCausalLM", "Phi3Model", gate="gate_up_proj", up="gate_up_proj"),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Model",
        gate=None,
        up="c_fc",
        down="c_proj",
    ),
    Family("phi", "PhiForCausalLM", "PhiModel", gate=None, up="fc1", down="fc2"),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXModel",
        blocks="gpt_neox.layers",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        stale=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Model",
        blocks="transformer.h",
        gate=None,
        up="c_fc",
        down="c_proj",
        inputs_first=True,
        width_key="n_inner",
        ffn_arguments="width, config",
        learns_positions=True,
        stale=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTModel",
        blocks="model.decoder.layers",
        mlp=None,
        gate=None,
        up="fc1",
        down="fc2",
        width_key="ffn_dim",
        learns_positions=True,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralModel",
        gate="w1",
        up="w3",
        down="w2",
        experts=Experts("num_local_experts", stored_mlp="block_sparse_moe"),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeModel",
        width_key="moe_intermediate_size",
        experts=Experts("num_experts"),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeModel",
        width_key="moe_intermediate_size",
        experts=Experts("num_experts"),
    ),
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


def check_is_text_only(fields: Mapping[str, Any]) -> None:
    """Check that a config is not that of a model whose decoder is one part of several.

    Args:
        fields: config.json.

    Raises:
        UnsupportedModelError: it has a text tower, whatever the family of that.
    """
    tower = fields.get("text_config")
    if fields.get("model_type") not in FAMILIES and tower is not None:
        kind = tower.get("model_type") if isinstance(tower, dict) else None
        what_to_do = (
            "save that as a causal language model of its own, prune it and put it back (the lines "
            "are in docs/families.md, 'Multimodal models')"
            if kind in FAMILIES
            else f"which is not supported either; supported are: {', '.join(sorted(FAMILIES))}"
        )
        raise UnsupportedModelError(
            f"model type {fields.get('model_type')!r} is multimodal and cannot be pruned as a "
            f"whole; its text tower is {kind or 'unnamed'}: {what_to_do}"
        )


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model config; see `family_of_type`."""
    if config.model_type not in FAMILIES:
        check_is_text_only(config.to_dict())
    family = family_of_type(config.model_type)
    if family.experts is not None:
        check_all_blocks_have_experts({**vars(config), "model_type": family.model_type})
    return family


def check_all_blocks_have_experts(fields: Mapping[str, Any]) -> None:
    """Check that a mixture of experts has experts in every block.

    Args:
        fields: config.json.

    Raises:
        UnsupportedModelError: some blocks are dense, so their width has another key.
    """
    dense = set(fields.get("mlp_only_layers") or ())
    step = int(fields.get("decoder_sparse_step") or 1)
    blocks = int(fields.get("num_hidden_layers") or 0)
    found = [i for i in range(blocks) if i in dense or (i + 1) % step]
    if found:
        raise UnsupportedModelError(
            f"blocks {', '.join(map(str, found))} of this {fields.get('model_type')} model have "
            "one dense FFN (mlp_only_layers, decoder_sparse_step), the others have experts; cfsp "
            "prunes mixtures of experts whose blocks all have experts"
        )


def intermediate_sizes(config: PreTrainedConfig) -> list[int]:
    """Return the number of FFN channels of every block, also of an already pruned model."""
    family = family_of(config)
    default = family.default_expansion * config.hidden_size
    widths = [getattr(block_config, family.width_key) for block_config in config.per_layer_config]
    return [int(default if width is None else width) for width in widths]


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return what a model is made of: one FFN unit in each block."""
    from cfsp.architecture.found import Architecture, ChannelAxis, FFNUnit

    family = family_of(config)
    if family.experts is not None:
        path = f"{family.mlp}.experts"
        up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
        gate: str | None = up
        axes = {up: ChannelAxis(1, "halves"), down: ChannelAxis(2)}
    else:
        path = family.mlp or ""
        up, down = (f"{family.path_in_block(name)}.weight" for name in (family.up, family.down))
        gate = f"{family.path_in_block(family.gate)}.weight" if family.gate else None
        out_axis, in_axis = (1, 0) if family.inputs_first else (0, 1)
        axis = ChannelAxis(out_axis, "halves" if family.is_fused else None)
        axes = {**{name: axis for name in (gate, up) if name}, down: ChannelAxis(in_axis)}
        axes |= {f"{name.removesuffix('weight')}bias": axis for name in (gate, up) if name}
    units = tuple(
        FFNUnit(
            block=block,
            path=path,
            width=width,
            ffns=family.ffn_count(config),
            up=up,
            gate=gate,
            down=down,
            axes=axes,
            routed=family.experts is not None,
        )
        for block, width in enumerate(intermediate_sizes(config))
    )
    return Architecture(
        family.causal_lm, family.blocks.rpartition(".")[0], family.blocks, len(units), units
    )
