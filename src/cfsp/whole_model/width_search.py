"""A search that shifts width between blocks, and keeps what brings a model nearer to the dense one.

Forward passes only, on the whole model in memory, by masking. Every round measures what each block
would lose by giving one step of channels and win by getting one, pairs the cheapest givers with
the best receivers, and tries all pairs that promise a gain, then half of them, and so on. What
lowers KL(dense || pruned) is kept; when nothing does, the step is halved. There is no chance in
it: the same windows give the same widths.

Shapes: N windows, T tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.checkpoint.families import family_of, intermediate_sizes
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import hidden_states_entering, resumed_at
from cfsp.whole_model.divergence import DensePredictions, dense_predictions
from cfsp.whole_model.masks import check_can_be_masked, masked_channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The first step is about this share of the widest block.
_FIRST_STEP = 1 / 8

# Channels that a block keeps at a width.
KeptAt = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True)
class FoundWidths:
    """What a search found.

    Attributes:
        kept_L: channels that every block keeps; their sum is that of the start.
        before: KL(dense || pruned) at the start, in nats per token.
        after: the same with `kept_L`; never larger.
        rounds: what each round did: step, pairs that were shifted, divergence afterwards.
    """

    kept_L: list[int]
    before: float
    after: float
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records of it: the divergences and the rounds."""
        return {"before": self.before, "after": self.after, "rounds": self.rounds}


@dataclass(frozen=True)
class Shift:
    """One step of channels from one block to another, and the gain that it promises."""

    giver: int
    receiver: int
    gain: float


def search_widths(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    kept_at: KeptAt,
    start_L: Sequence[int],
    multiple: int,
    rounds: int,
    on_pass: Callable[[], object] = lambda: None,
) -> FoundWidths:
    """Search for widths with the same sum that move the model's predictions less.

    Args:
        model: the whole dense model, in evaluation mode.
        tokens_NT: windows that the statistics have not seen, without padding.
        kept_at: gives the channels that a block keeps at a width.
        start_L: widths to begin with.
        multiple: what widths change by multiples of.
        rounds: how many at most; each costs about as many forward passes over the windows as
            there are blocks.
        on_pass: is called after each forward pass of a window, whole or from some block on.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
    """
    trial = _Trial(model, tokens_NT, kept_at, on_pass)
    width_L = trial.full_width_L
    step = max(1, round(max(width_L) * _FIRST_STEP / multiple)) * multiple
    found_L, best = list(start_L), trial.divergence(start_L)
    result = FoundWidths(found_L, best, best)
    for _ in range(rounds):
        give_L, get_L = trial.marginals(found_L, step, multiple)
        shifts = promising_shifts(give_L, get_L)
        count = len(shifts)
        while count:
            candidate_L = shifted(found_L, shifts[:count], step)
            divergence = trial.divergence(candidate_L)
            if divergence < best:
                found_L, best = candidate_L, divergence
                break
            count //= 2
        result.rounds.append({"step": step, "shifts": count, "divergence": best})
        if count == 0:
            if step == multiple:
                break
            step = max(1, step // 2 // multiple) * multiple
    return FoundWidths(found_L, result.before, best, result.rounds)


def promising_shifts(give_L: Sequence[float | None], get_L: Sequence[float | None]) -> list[Shift]:
    """Pair the cheapest givers with the best receivers, each block once, while that is a gain.

    Args:
        give_L: what each block loses by giving one step; None if it cannot.
        get_L: what each block wins by getting one; None if it cannot.
    """
    givers = sorted((cost, block) for block, cost in enumerate(give_L) if cost is not None)
    receivers = sorted((-gain, block) for block, gain in enumerate(get_L) if gain is not None)
    shifts: list[Shift] = []
    while givers and receivers:
        cost, giver = givers.pop(0)
        others = [pair for pair in receivers if pair[1] != giver]
        if not others or -others[0][0] <= cost:
            break
        gain, receiver = -others[0][0], others[0][1]
        shifts.append(Shift(giver, receiver, gain - cost))
        givers = [pair for pair in givers if pair[1] != receiver]
        receivers = [pair for pair in receivers if pair[1] not in (giver, receiver)]
    return shifts


def shifted(kept_L: Sequence[int], shifts: Sequence[Shift], step: int) -> list[int]:
    """Return the widths after some shifts of `step` channels each."""
    result_L = list(kept_L)
    for shift in shifts:
        result_L[shift.giver] -= step
        result_L[shift.receiver] += step
    return result_L


class _Trial:
    """Measures the divergence of widths from the dense model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens_NT: Tensor,
        kept_at: KeptAt,
        on_pass: Callable[[], object],
    ) -> None:
        family = family_of(model.config)
        check_can_be_masked(family)
        self.full_width_L = intermediate_sizes(model.config)
        self._model, self._kept_at, self._on_pass = model, kept_at, on_pass
        self._blocks = blocks_of(model, family)
        with torch.inference_mode():
            self._dense = [dense_predictions(model, tokens_T[None]) for tokens_T in tokens_NT]

    def divergence(self, kept_L: Sequence[int]) -> float:
        """Return KL(dense || pruned), the mean over all windows."""
        with torch.inference_mode(), self._masked(kept_L):
            return sum(map(self._one, self._dense)) / len(self._dense)

    def marginals(
        self, kept_L: Sequence[int], step: int, multiple: int
    ) -> tuple[list[float | None], list[float | None]]:
        """Return what every block loses by giving a step and wins by getting one.

        None where it cannot: a block keeps at least one multiple and at most all.
        """
        changed = {
            (block, change): kept + change
            for block, kept in enumerate(kept_L)
            for change in (-step, step)
            if multiple <= kept + change <= self.full_width_L[block]
        }
        rise = dict.fromkeys(changed, 0.0)
        for dense in self._dense:
            with torch.inference_mode():
                with self._masked(kept_L), hidden_states_entering(self._blocks) as entering_L:
                    here = self._one(dense)
                for (block, change), width in changed.items():
                    tried_L = [*kept_L[:block], width, *kept_L[block + 1 :]]
                    with (
                        self._masked(tried_L),
                        resumed_at(self._blocks, block, entering_L[block]),
                    ):
                        rise[block, change] += (self._one(dense) - here) / len(self._dense)
        blocks = range(len(kept_L))
        losses = [rise.get((block, -step)) for block in blocks]
        gains = [rise.get((block, step)) for block in blocks]
        return losses, [None if gain is None else -gain for gain in gains]

    @contextmanager
    def _masked(self, kept_L: Sequence[int]) -> Iterator[None]:
        kept = {block: self._kept_at(block, width) for block, width in enumerate(kept_L)}
        with masked_channels(self._model, kept):
            yield

    def _one(self, dense: DensePredictions) -> float:
        divergence = dense.divergence(self._model)
        self._on_pass()
        return divergence
