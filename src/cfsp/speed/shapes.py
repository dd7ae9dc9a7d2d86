"""The true shapes of well-known models, as data: to time them no checkpoint is needed.

Numbers are those of the models' published config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.config_widths import config_with_widths
from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.errors import UsageError
from cfsp.planning.allocation import round_widths
from cfsp.settings import Budget, Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500000.0}

# Name -> model type and the config keys that say how large its matrices are.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA_3, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-2-13b": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        **_LLAMA_3, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        **_LLAMA_3, "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "tie_word_embeddings": False, "sliding_window": None,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip


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
        return pruned_config(self.original, architecture, self.removed, self.widths, None)


@dataclass(frozen=True)
class ShapedModel:
    """A model with random weights in the shapes of a well-known one.

    Attributes:
        shape: a name in `SHAPES`.
        blocks: how many blocks; None for all.
        sparsity: fraction of FFN channels that is missing, the same in every block.
        width: exact FFN width instead of `sparsity`.
    """

    shape: str
    blocks: int | None = None
    sparsity: float = 0.0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UsageError(f"no shape {self.shape!r} is known; known are: {', '.join(SHAPES)}")
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"--blocks must be at least 1, found {self.blocks}")
        if self.width is not None and self.width < 1:
            raise UsageError(f"an FFN is at least 1 channel wide, found {self.width}")

    @property
    def label(self) -> str:
        """What to call it."""
        if self.width is not None:
            return f"{self.shape}, {self.width} wide"
        return f"{self.shape}, {self.sparsity:.0%} pruned" if self.sparsity else self.shape

    @property
    def whole(self) -> bool:
        """Whether it has all blocks of the original."""
        return self.blocks in (None, SHAPES[self.shape]["num_hidden_layers"])

    def widths(self) -> list[int]:
        """Return the FFN width of every block; they sum to the budget within one multiple."""
        original = SHAPES[self.shape]
        dense = [original["intermediate_size"]] * (self.blocks or original["num_hidden_layers"])
        if self.width is not None:
            return [self.width] * len(dense)
        total = (1 - self.sparsity) * sum(dense)
        ideal = [(1 - self.sparsity) * width for width in dense]
        multiple = Budget(self.sparsity).multiple_for(dense)
        alike = len(dense)
        return round_widths(ideal, dense, [1] * alike, [multiple] * alike, total)

    def config(self) -> PreTrainedConfig:
        """Return the config, with the true vocabulary."""
        from transformers import CONFIG_MAPPING

        fields = dict(SHAPES[self.shape])
        widths = self.widths()
        fields.update(num_hidden_layers=len(widths), intermediate_size=max(widths))
        config: PreTrainedConfig = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        return config_with_widths(config, architecture_of(config), widths)
