"""How much work a model does for a workload: the speed-up that its size promises.

Prefill is bound by arithmetic, decoding of few sequences by reading weights and cache. The
ideal ratio of two models is therefore that of their FLOPs in prefill and of the bytes they read
in decoding. Embedding rows are looked up and cost nothing; norms are not counted. Full causal
attention is assumed; so are no matrices between the blocks and the head (OPT-350M has two).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.checkpoint.text_config import text_config_of
from cfsp.speed.workload import Workload

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource


@dataclass(frozen=True)
class ModelWork:
    """The numbers of a model that its work follows from.

    Attributes:
        block_parameters: elements of all matrices in the blocks.
        block_bytes: their bytes, as they are read.
        head_parameters: elements of the language-model head; 0 if it is not timed.
        head_bytes: its bytes.
        attention_width: heads times head dimension, summed over the blocks.
        cache_bytes: bytes of keys and values of one token in all blocks.
        expert_parameters: elements of the experts' matrices, of those in the blocks.
        routed_share: fraction of the experts that one token passes.
    """

    block_parameters: int
    block_bytes: float
    head_parameters: int
    head_bytes: float
    attention_width: int
    cache_bytes: float
    expert_parameters: int = 0
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


def work_of(source: WeightSource, *, head: bool, itemsize: float) -> ModelWork:
    """Return the work of a transformers model.

    Args:
        source: the model; only its config and shapes are read.
        head: whether the language-model head is timed.
        itemsize: bytes of an element, of weights and of the cache.
    """
    config = text_config_of(source.config)
    experts = [unit.ffns for unit in source.units if unit.routed]
    parameters = expert_parameters = 0
    for name in source.stored.within(f"{source.architecture.blocks}."):
        spec = source.specs[name]
        if len(spec.shape) >= 2:
            parameters += spec.elements
            layout = source.layout_of(name)
            if layout is not None and source.units[layout.unit].routed:
                expert_parameters += spec.elements
    routed = config.num_experts_per_tok / experts[0] if experts else 1.0
    head_parameters = config.vocab_size * config.hidden_size if head else 0
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Families without grouped attention have no such key.
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks = source.architecture.block_count
    return ModelWork(
        block_parameters=parameters,
        block_bytes=parameters * itemsize,
        head_parameters=head_parameters,
        head_bytes=head_parameters * itemsize,
        attention_width=blocks * heads * head_dim,
        cache_bytes=2 * blocks * kv_heads * head_dim * itemsize,
        expert_parameters=expert_parameters,
        routed_share=routed,
    )
