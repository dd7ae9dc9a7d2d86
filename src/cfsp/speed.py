"""How fast models are, relative to each other: interleaved runs in one process.

Machines drift. Models therefore take turns, round after round, and the figure to quote is the
median of the ratios within a round. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Throughput of one model and its ratio to the first model, round by round.

    Attributes:
        tokens_per_second: one figure for each round.
        ratios: tokens per second over those of the first model in the same round.
    """

    tokens_per_second: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median_tokens_per_second(self) -> float:
        """Median over rounds."""
        return median(self.tokens_per_second)

    @property
    def median_ratio(self) -> float:
        """Median over rounds; above 1 is faster than the first model."""
        return median(self.ratios)


@dataclass(frozen=True)
class SpeedConditions:
    """What is timed: `batch` sequences with a prompt, then new tokens one by one."""

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 32
    rounds: int = 5


def measure_prefill(
    models: Mapping[str, PreTrainedModel], conditions: SpeedConditions
) -> dict[str, Speed]:
    """Time the forward pass over a prompt, as in the first step of generation."""

    def run(model: PreTrainedModel) -> int:
        tokens_BT = _tokens(model, conditions)
        model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)
        return tokens_BT.numel()

    return _interleaved(models, run, conditions.rounds)


def measure_decode(
    models: Mapping[str, PreTrainedModel], conditions: SpeedConditions
) -> dict[str, Speed]:
    """Time greedy generation token by token; the prompt is short and its time is included."""

    def run(model: PreTrainedModel) -> int:
        tokens_BT = _tokens(model, conditions)[:, :8]
        new = conditions.new_tokens
        model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
        )
        return int(tokens_BT.shape[0]) * new

    return _interleaved(models, run, conditions.rounds)


def _tokens(model: PreTrainedModel, conditions: SpeedConditions) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (conditions.batch, conditions.prompt)
    high = int(model.config.vocab_size)
    return torch.randint(high, shape, generator=generator).to(model.device)


def _interleaved(
    models: Mapping[str, PreTrainedModel], run: Callable[[PreTrainedModel], int], rounds: int
) -> dict[str, Speed]:
    rates: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            run(model)
        for _ in range(rounds):
            for name, model in models.items():
                start = time.perf_counter()
                tokens = run(model)
                _wait(model)
                rates[name].append(tokens / (time.perf_counter() - start))
    first = next(iter(rates.values()))
    return {
        name: Speed(tuple(rate), tuple(r / f for r, f in zip(rate, first, strict=True)))
        for name, rate in rates.items()
    }


def _wait(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
