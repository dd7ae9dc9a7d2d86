"""What is timed, under which conditions, and the work of it: the speed-up that a size promises.

Prefill is bound by arithmetic, decoding of few sequences by reading weights and cache. The
ideal ratio of two models is therefore that of their FLOPs in prefill and of the bytes they read
in decoding. Embedding rows are looked up and cost nothing; norms are not counted. Attention is
taken to be causal and full where the config does not call a block linear or state-space; what those
do besides their matrices is not counted. So are no matrices between the blocks and the head
(OPT-350M has two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import WeightSource, channel_parameters
from cfsp.checkpoint.skeleton import blocks_of, empty_model
from cfsp.checkpoint.text_config import head_size, text_config_of
from cfsp.errors import UsageError, did_you_mean

PHASES = ("prefill", "decode")
ENGINES = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class Workload:
    """Prefill of a prompt, then generation of new tokens, one by one for each sequence."""

    batch: int = 1  # sequences at once
    prompt: int = 512  # tokens of each
    new_tokens: int = 32  # generated for each after the first, which the prefill gives

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least 1, found {value}")

    def describe(self) -> str:
        """Return one line for people."""
        return f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Conditions:
    """How to measure."""

    engine: str = "transformers"  # one of `ENGINES`
    warmups: int = 2  # untimed runs of each workload before the rounds
    rounds: int = 7  # timed runs of each model, in turns
    # A round is measured again, for half a minute in all, while other programs take more than this
    # fraction of the processors.
    disturbance: float = 0.05
    # As for prune; of the engine transformers only.
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(
                f"the engine is one of {', '.join(ENGINES)}, found {self.engine!r}"
                f"{did_you_mean(self.engine, ENGINES)}"
            )
        if self.rounds < 1:
            raise UsageError(f"expected at least 1 round, found {self.rounds}")
        if not self.disturbance >= 0:
            raise UsageError(f"disturbance must be at least 0, found {self.disturbance}")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of a workload."""

    prefill: float  # until the first new token is known, so also the time to first token
    decode: float  # of all further tokens
    disturbance: float = 0.0  # fraction of all processors that other programs took meanwhile


# How configs call the number of experts that a token passes, where no router keeps it.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class ModelWork:
    """The numbers of a model that its work follows from."""

    block_parameters: int  # elements of all matrices in the blocks
    block_bytes: float  # as they are read
    head_parameters: int
    head_bytes: float
    attention_width: int  # heads times head dimension, summed over the blocks
    cache_bytes: float  # of keys and values of one token in all blocks
    expert_parameters: int = 0  # of those in the blocks
    # Fraction of the experts that one token passes; NaN if unknown, as all that follows from it.
    routed_share: float = 1.0

    def prefill_flops(self, workload: Workload) -> float:
        """Return the FLOPs of a prefill; the head sees the last token of each sequence only."""
        tokens = workload.batch * workload.prompt
        pairs = workload.batch * workload.prompt * (workload.prompt + 1) / 2
        passed = self.block_parameters - (1 - self.routed_share) * self.expert_parameters
        return (
            2.0 * tokens * passed
            + 4.0 * pairs * self.attention_width
            + 2.0 * workload.batch * self.head_parameters
        )

    def decode_bytes(self, workload: Workload) -> float:
        """Return the bytes read for one new token of every sequence, on average over them.

        Of the experts those are read that some sequence is routed to, which are counted as if
        each sequence picked its own by chance.
        """
        context = workload.prompt + (workload.new_tokens + 1) / 2
        untouched = (1 - self.routed_share) ** workload.batch
        itemsize = self.block_bytes / self.block_parameters
        weights = self.block_bytes - untouched * self.expert_parameters * itemsize
        weights += self.head_bytes
        return weights + workload.batch * context * self.cache_bytes


@dataclass(frozen=True)
class Footprint:
    """What a model weighs."""

    parameters: int  # tied embeddings count once
    disk_bytes: int  # of the weight files; of the tensors where there is no file
    work: ModelWork


def work_of(source: WeightSource, itemsize: int) -> ModelWork:
    """Return the work of a transformers model, from config and shapes.

    An element has `itemsize` bytes, in weights and cache.
    """
    config: Any = text_config_of(source.config)
    channels = channel_parameters(source.architecture)
    of_blocks = {
        name: spec.elements
        for name, spec in source.parameters.items()
        # Biases of experts have an axis of experts.
        if name.startswith(f"{source.architecture.blocks}.")
        and len(spec.shape) >= 2
        and not name.endswith("bias")
    }
    parameters, share = sum(of_blocks.values()), 1.0
    of_experts = (n for n in of_blocks if n in channels and source.units[channels[n][0]].routed)
    expert_parameters = sum(of_blocks[name] for name in of_experts)
    if (routed := next((unit for unit in source.units if unit.routed), None)) is not None:
        blocks = blocks_of(empty_model(source.config), source.architecture)
        share = experts_per_token(config, blocks, routed) / routed.ffns
    head_parameters = config.vocab_size * config.hidden_size
    width, cache_width = _attention_of(config)
    attentions = _attentions(config, source)
    return ModelWork(
        block_parameters=parameters,
        block_bytes=parameters * itemsize,
        head_parameters=head_parameters,
        head_bytes=head_parameters * itemsize,
        attention_width=round(attentions * width),
        cache_bytes=round(attentions * cache_width * itemsize),
        expert_parameters=expert_parameters,
        routed_share=share,
    )


def experts_per_token(config: Any, blocks: nn.ModuleList, unit: Unit) -> float:
    """Return how many of a unit's experts a token passes; NaN if nothing says so."""
    # Routers keep the number, whatever the config calls it.
    beside = blocks[unit.block].get_submodule(unit.path.rpartition(".")[0])
    kept = {vars(module).get("top_k") for module in beside.modules()} - {None}
    if len(kept) == 1 and isinstance(count := kept.pop(), int):
        return count
    named = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((count for count in named if isinstance(count, int)), math.nan)


def _attention_of(config: Any) -> tuple[int, int]:
    """Return one block's heads times the mean size of key and value, and elements of its cache."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if not heads:
        return 0, 0
    if getattr(config, "kv_lora_rank", None) is not None:
        # Latent attention: what keys and values are made of is kept, once for all heads.
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return heads * both // 2, config.kv_lora_rank + config.qk_rope_head_dim
    size = head_size(config)
    # Families without grouped attention have no such key.
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1
    return heads * size, 2 * kv_heads * size


def _attentions(config: Any, source: WeightSource) -> float:
    """Return how many blocks look back at all tokens; state-space and linear ones do not.

    Where the config has no list of kinds, all count. One that lost KV groups is a fraction.
    """
    count: float = source.architecture.block_count
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and len(kinds) == count:
            count = sum("attention" in kind and "linear" not in kind for kind in kinds)
            break
    for unit in source.architecture.stock_units:
        if unit.part == "kv":
            groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            count -= max(0.0, 1 - unit.width / (1 if unit.is_whole else groups))
    return count
