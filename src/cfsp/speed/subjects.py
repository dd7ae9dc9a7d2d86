"""What can be timed: a checkpoint by name, a true shape with random weights, a .gguf file.

Shapes are those of the published config.json files of well-known models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.loading import compute_dtype, load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.checkpoint.skeleton import architecture_of, build_skeleton
from cfsp.errors import UsageError
from cfsp.planning.allocation import round_widths
from cfsp.settings import Budget, Part
from cfsp.speed.work import Footprint, work_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What the head is left out of needs no real vocabulary.
_SMALL_VOCABULARY = 256
_INITIAL_RANGE = 0.02

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
    """A model with random weights in the shapes of another that lost something."""

    original: PreTrainedConfig  # stays as it is
    parts: tuple[Part, ...]  # may have lost something
    widths: tuple[int, ...]  # of every unit of these parts, in the blocks that stay
    removed: tuple[int, ...] = ()  # blocks that are gone

    def config(self) -> PreTrainedConfig:
        """Return the config."""
        architecture = architecture_of(self.original, self.parts)
        return pruned_config(self.original, architecture, self.widths, self.removed)


@dataclass(frozen=True)
class ShapedModel:
    """A model with random weights in the shapes of a well-known one."""

    shape: str  # a name in `SHAPES`
    blocks: int | None = None  # how many; None for all
    sparsity: float = 0.0  # fraction of FFN channels that is missing, the same in every block

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


@dataclass(frozen=True)
class Subject:
    """One model to time, and what to call it: a name as for prune, a .gguf file, or a shape."""

    model: str | Path | ShapedModel | SmallerModel
    label: str

    @property
    def head(self) -> bool:
        """Whether the language-model head is timed.

        It is left out for a few blocks of a true shape, beside which it would weigh more than it
        does in the whole model.
        """
        return not isinstance(self.model, ShapedModel) or self.model.whole


def build_model(
    subject: Subject, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    """Return the transformers model of a subject and its footprint."""
    if isinstance(subject.model, ShapedModel | SmallerModel):
        return _random_model(subject, subject.model, dtype_name, device)
    checkpoint = open_checkpoint(subject.model)
    dtype = compute_dtype(checkpoint, dtype_name)
    model = load(checkpoint.directory, dtype=dtype, device=device)
    work = work_of(checkpoint, head=subject.head, itemsize=dtype.itemsize)
    files = checkpoint.directory.glob("*.safetensors")
    size = sum(path.stat().st_size for path in files if not path.name.startswith("cfsp_"))
    return model, Footprint(parameter_count(checkpoint), size, work)


def _random_model(
    subject: Subject, shaped: ShapedModel | SmallerModel, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    dtype = getattr(torch, "bfloat16" if dtype_name == "auto" else dtype_name)
    config = shaped.config()
    if not subject.head:
        config.vocab_size = _SMALL_VOCABULARY
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    model = build_skeleton(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim == 1:
                values.fill_(1.0)
            else:
                values.uniform_(-_INITIAL_RANGE, _INITIAL_RANGE, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.to(device)
    source = LoadedModel(model)
    in_blocks = set(source.stored.within(f"{source.architecture.blocks}."))
    timed = [spec for name, spec in source.specs.items() if subject.head or name in in_blocks]
    return model, Footprint(
        sum(spec.elements for spec in timed),
        sum(spec.nbytes for spec in timed),
        work_of(source, head=subject.head, itemsize=dtype.itemsize),
    )
