"""The true shapes of well-known models, as data: to time them no checkpoint is needed.

Numbers are those of the models' published config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.errors import UsageError
from cfsp.planning.allocation import round_widths
from cfsp.settings import Budget, Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_PUBLISHED: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-3-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, False),
}
_MORE: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {"rope_theta": 500000.0},
    "llama-3-8b": {"rope_theta": 500000.0},
    "llama-3-70b": {"rope_theta": 500000.0},
    "mistral-7b": {"sliding_window": None},
    "qwen3-8b": {"head_dim": 128},
}
# Name -> model type and the config keys that say how large its matrices are.
SHAPES: dict[str, dict[str, Any]] = {
    name: {**dict(zip(_KEYS, numbers, strict=True)), **_MORE.get(name, {})}
    for name, numbers in _PUBLISHED.items()
}


@dataclass(frozen=True)
class SmallerModel:
    """A model with random weights in the shapes of another that lost something.

    Attributes:
        original: config of the other model; stays as it is.
        parts: may have lost something.
        widths: of every unit that a model opened with these parts has, in the blocks that stay.
        removed: indices of blocks that are gone.
    """

    original: PreTrainedConfig
    parts: tuple[Part, ...]
    widths: tuple[int, ...]
    removed: tuple[int, ...] = ()

    def config(self) -> PreTrainedConfig:
        """Return the config."""
        architecture = architecture_of(self.original, self.parts)
        return pruned_config(self.original, architecture, self.widths, self.removed)


@dataclass(frozen=True)
class ShapedModel:
    """A model with random weights in the shapes of a well-known one.

    Attributes:
        shape: a name in `SHAPES`.
        blocks: how many blocks; None for all.
        sparsity: fraction of FFN channels that is missing, the same in every block.
    """

    shape: str
    blocks: int | None = None
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UsageError(f"no shape {self.shape!r} is known; known are: {', '.join(SHAPES)}")
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"--blocks must be at least 1, found {self.blocks}")

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.shape}, {self.sparsity:.0%} pruned" if self.sparsity else self.shape

    @property
    def whole(self) -> bool:
        """Whether it has all blocks of the original."""
        return self.blocks in (None, SHAPES[self.shape]["num_hidden_layers"])

    def widths(self) -> list[int]:
        """Return the FFN width of every block; they sum to the budget within one multiple."""
        original = SHAPES[self.shape]
        dense = [original["intermediate_size"]] * (self.blocks or original["num_hidden_layers"])
        ideal = [(1 - self.sparsity) * width for width in dense]
        multiples = [Budget(self.sparsity).multiple_for(dense)] * len(dense)
        return round_widths(ideal, dense, [1] * len(dense), multiples, sum(ideal))

    def config(self) -> PreTrainedConfig:
        """Return the config, with the true vocabulary."""
        from transformers import CONFIG_MAPPING

        fields = dict(SHAPES[self.shape])
        widths = self.widths()
        fields.update(num_hidden_layers=len(widths), intermediate_size=max(widths))
        config: PreTrainedConfig = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        return pruned_config(config, architecture_of(config), widths)
