"""The whole model in memory, without some of its parts, and how far its predictions are from dense.

The Kullback-Leibler divergence of the next-token distribution, KL(dense || changed), in nats per
token, has far less noise than a difference of losses: few windows tell small changes apart. The
model is uncut: weights that read pruned channels are zero meanwhile, and blocks that go are
skipped. All other weights stay as they are: the result is that of `--repair none`.

Shapes: B windows, T tokens, P positions in a window (pruned channels in masks), V vocabulary, D
hidden, F FFN channels, K kept, L blocks, N windows, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp.architecture.expert_proof import masked_experts
from cfsp.architecture.found import Unit
from cfsp.architecture.resizing import Gone
from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.job import Job
from cfsp.planning.candidate import NOTHING, Dropped
from cfsp.planning.importance import choose_channels
from cfsp.progress import item_progress
from cfsp.settings import AUTO_METRIC, SENSITIVITY, UNIT_PARTS, Criterion, Part
from cfsp.streaming.decoder_end import logits_of, text_model
from cfsp.streaming.runtime import Runtime, check_fits, is_there, no_number
from cfsp.streaming.stand_in import (
    CallForm,
    find_call_form,
    hidden_states_entering,
    resumed_at,
    skipped,
)
from cfsp.text.windows import Windows, few_windows

KeptChannels = Mapping[int, Sequence[int]]

# At least so many windows are compared, or as many as texts, and of each this beginning. The
# divergence has little noise (LOG.md), and each window costs a forward pass for every change.
LEAST_WINDOWS = 8
BEGINNING_TOKENS = 256
# Predictions of neighbours are alike: of every few tokens one is compared, which keeps the cost
# of a large vocabulary small.
POSITION_STRIDE = 4
# Half of every block's channels: the ranking of blocks hardly depends on how many go (LOG.md), so
# that one measurement serves every budget.
SENSITIVITY_SPARSITY = 0.5
# Tokens that pass a whole model at once: on a CPU 512 take a sixth to a quarter less time than 256,
# more a seventh less at most (LOG.md, 2026-11-30). The predictions after them are in memory.
_TOKENS_AT_ONCE = 512
_SAME = 1e-4  # in nats: equal predictions, but for rounding


def load_whole(source: WeightSource, runtime: Runtime, purpose: str) -> PreTrainedModel:
    """Return the whole model of a source, ready to run; where it is it has the same tensors."""
    if isinstance(source, LoadedModel) and is_there(source, runtime):
        return source.as_loaded()
    check_fits(source, runtime, purpose)
    if isinstance(source, LoadedModel):
        return source.as_loaded().to(runtime.device, runtime.dtype)
    assert isinstance(source, Checkpoint)
    return load(source.directory, dtype=runtime.dtype, device=runtime.device)


@torch.inference_mode()
def call_form_of(model: PreTrainedModel, blocks: nn.ModuleList) -> CallForm:
    """Return how a whole model takes hidden states from its blocks; see `find_call_form`."""
    return find_call_form(partial(logits_of, model), blocks, model.device)


@dataclass(frozen=True)
class DensePredictions:
    """What the dense model predicts after every `POSITION_STRIDE`-th token of some windows."""

    tokens_BT: Tensor
    probability_BPV: Tensor  # of the next token, float32
    negative_entropy_BP: Tensor  # sum over the vocabulary of p log p, float32

    def divergence(self, model: PreTrainedModel) -> float:
        """Return KL(dense || model), the mean over positions, in nats per token."""
        log_model_BPV = _logits(model, self.tokens_BT).log_softmax(-1)
        expected_BP = torch.linalg.vecdot(self.probability_BPV, log_model_BPV)
        return float((self.negative_entropy_BP - expected_BP).double().mean())


def dense_predictions(model: PreTrainedModel, tokens_BT: Tensor) -> DensePredictions:
    """Return what a model predicts, to compare changed ones with."""
    log_dense_BPV = _logits(model, tokens_BT).log_softmax(-1)
    probability_BPV = log_dense_BPV.exp()
    # By the same product as in `divergence`, whose rounding is then the same: of logits, or by
    # another sum, a model was .0003 from itself.
    negative_entropy_BP = torch.linalg.vecdot(probability_BPV, log_dense_BPV)
    return DensePredictions(tokens_BT, probability_BPV, negative_entropy_BP)


def prediction_bytes(vocabulary: int) -> int:
    """Return what comparing the predictions of a batch takes in memory, at most."""
    # Probabilities of the dense model, logits of the changed one as computed and in float32, and
    # their exponentials.
    return 4 * 4 * (_TOKENS_AT_ONCE // POSITION_STRIDE) * vocabulary


def in_batches(tokens_NT: Tensor) -> tuple[Tensor, ...]:
    """Return windows as they pass a whole model: some at once."""
    return torch.split(tokens_NT, max(1, _TOKENS_AT_ONCE // tokens_NT.shape[1]))


def few_beginnings(windows: Windows, tokens: int = BEGINNING_TOKENS) -> Windows:
    """Return the beginnings of a few windows: more kinds of text in the same time."""
    few = few_windows(windows, max(LEAST_WINDOWS, len(windows.sources)))
    return replace(few, tokens_NT=few.tokens_NT[:, :tokens])


def _logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    position_P = torch.arange(0, tokens_BT.shape[1], POSITION_STRIDE, device=model.device)
    tokens_BT = tokens_BT.to(model.device)
    return logits_of(text_model(model), tokens_BT, logits_to_keep=position_P).float()


class MaskedModel:
    """A whole model that runs on the same windows again and again, without some of its parts.

    Where it `resumes`, it keeps what enters every block, which no later one changes: only those
    behind a changed one compute again. Models whose blocks need more of earlier ones compute all.
    """

    def __init__(
        self,
        source: WeightSource,
        model: PreTrainedModel,
        batches: Iterable[Tensor],
        *,
        resumes: bool = True,
    ) -> None:
        self._source, self._model = source, model
        self._blocks = blocks_of(model, source.architecture)
        self._form = call_form_of(model, self._blocks)
        self._dense: list[DensePredictions] = []
        self._entering: list[list[Tensor]] = []
        with torch.inference_mode():
            for tokens_BT in batches:
                with hidden_states_entering(self._blocks if resumes else ()) as entering_L:
                    self._dense.append(dense_predictions(model, tokens_BT))
                self._entering.append(entering_L)
            self._resumes = resumes and self._can_resume()

    def _can_resume(self) -> bool:
        """Return whether the last block needs nothing of those before but a hidden state."""
        entering_BTD, last = self._entering[0][-1], len(self._blocks) - 1
        try:
            with resumed_at(self._blocks, last, entering_BTD, self._form):
                return abs(self._dense[0].divergence(self._model)) < _SAME
        except Exception:  # however a model misses what its stand-ins do not leave
            return False

    @contextmanager
    def _without(self, dropped: Dropped, kept: KeptChannels) -> Iterator[None]:
        units = self._source.units
        gone = {index: () for index, unit in enumerate(units) if dropped.takes(unit)}
        masks = {
            index: kept_K
            for index, kept_K in {**gone, **kept}.items()
            if units[index].block not in dropped.blocks
            and len(kept_K) < units[index].ffns * units[index].width
        }
        with (
            masked_channels(self._source, self._model, masks),
            skipped(self._blocks, dropped.blocks, self._form),
        ):
            yield

    def note_entering(self, dropped: Dropped) -> None:
        """Note what enters every block when some are gone, if a pass can begin there."""
        if not self._resumes:
            return
        with torch.inference_mode(), self._without(dropped, {}):
            for index, dense in enumerate(self._dense):
                with hidden_states_entering(self._blocks) as entering_L:
                    dense.divergence(self._model)
                self._entering[index] = entering_L

    def divergence(
        self, dropped: Dropped = NOTHING, kept: KeptChannels | None = None, first: int = 0
    ) -> float:
        """Return KL(dense || without what goes), the mean over windows, in nats per token.

        Nothing that was not gone when hidden states were noted goes before the block `first`.
        """
        total, windows = 0.0, 0
        first = first if self._resumes else 0
        with torch.inference_mode(), self._without(dropped, kept or {}):
            for dense, entering_L in zip(self._dense, self._entering, strict=True):
                with ExitStack() as stack:
                    if first:
                        resumed = resumed_at(self._blocks, first, entering_L[first], self._form)
                        stack.enter_context(resumed)
                    total += dense.divergence(self._model) * len(dense.tokens_BT)
                windows += len(dense.tokens_BT)
        return total / windows


@contextmanager
def masked_channels(
    source: WeightSource, model: PreTrainedModel, kept: KeptChannels
) -> Iterator[None]:
    """Let a model compute as if units had some of their channels only; others have all."""
    blocks = blocks_of(model, source.architecture)
    with ExitStack() as stack:
        for index, kept_K in kept.items():
            unit = source.units[index]
            stack.enter_context(masked_unit(blocks[unit.block], unit, kept_K))
        yield


@contextmanager
def masked_unit(block: nn.Module, unit: Unit, kept_K: Sequence[int]) -> Iterator[None]:
    """Let one unit of a decoder block compute as if it had the kept channels only.

    The pruned columns of its down projections are zero meanwhile, and kept elsewhere. To experts
    that keep none the router sends no token, and an attention that keeps none is not there.
    """
    if unit.part == "kv" and not kept_K:
        attention = block.get_submodule(unit.path)
        block.set_submodule(unit.path, Gone(unit.extras))
        try:
            yield
        finally:
            block.set_submodule(unit.path, attention)
        return
    axis = unit.axes[unit.down].axis
    down = block.get_parameter(unit.down).detach()
    matrices = [down]
    if down.ndim == 3:  # those of all experts
        matrices, axis = list(down), axis - 1
    is_pruned_EF = torch.ones(unit.ffns, unit.width, dtype=torch.bool)
    is_pruned_EF.view(-1)[list(kept_K)] = False
    pruned = [
        unit.axes[unit.down].index(is_pruned_F.nonzero().flatten(), unit.width).to(down.device)
        for is_pruned_F in is_pruned_EF
    ]
    staying = (~is_pruned_EF).any(1).nonzero().flatten().tolist()
    with ExitStack() as stack:
        if 0 < len(staying) < unit.ffns and unit.expert_axes:
            stack.enter_context(masked_experts(block, unit, staying))
        for matrix, pruned_P in zip(matrices, pruned, strict=True):
            columns = matrix.index_select(axis, pruned_P)
            stack.callback(matrix.index_copy_, axis, pruned_P, columns)
            matrix.index_fill_(axis, pruned_P, 0)
        yield


# Sensitivity: how far the predictions move when a block's FFNs alone are pruned, or its attention.
# Angular distance says how much a block does, sensitivity how much of that its weakest channels do.


def block_sensitivities(
    source: WeightSource,
    model: PreTrainedModel,
    tokens_NT: Tensor,
    kept_U: Sequence[Sequence[int]],
    parts: Collection[Part] = UNIT_PARTS,
) -> dict[Part, list[float]]:
    """Return how far pruning a part of each block alone moves the predictions, in nats per token.

    KL(dense || one block pruned), the mean over tokens. All units of one part of a block are pruned
    together; a block without any moves nothing.
    """
    kept_of: dict[tuple[int, Part], dict[int, Sequence[int]]] = {}
    for index, unit in enumerate(source.units):
        if unit.part in parts:
            kept_of.setdefault((unit.block, unit.part), {})[index] = kept_U[index]
    total: dict[Part, list[float]] = {
        part: [0.0] * source.architecture.block_count for _, part in kept_of
    }
    with item_progress("sensitivity", len(tokens_NT) * len(kept_of), "pass") as bar:
        for tokens_BT in in_batches(tokens_NT):  # what enters all blocks is kept of one batch
            masked = MaskedModel(source, model, [tokens_BT])
            for (block, part), kept in sorted(kept_of.items()):
                total[part][block] += masked.divergence(kept=kept, first=block) * len(tokens_BT)
                bar.update(len(tokens_BT))
    return {part: [each / len(tokens_NT) for each in total_L] for part, total_L in total.items()}


def follow_sensitivity(criterion: Criterion, fits: Callable[[], bool]) -> bool:
    """Return whether widths will follow the sensitivity of blocks: by `auto` if the model fits."""
    metric = criterion.block_metric
    return metric == SENSITIVITY or (metric == AUTO_METRIC and fits())


def with_needed_sensitivity(job: Job, statistics: Statistics) -> Statistics:
    """Add the sensitivity of blocks where widths follow it, of the parts that may lose channels.

    Statistics that have it stay as they are. A killed run goes on with what it had measured. Of
    several processes the first measures.
    """
    work_dir, parts = job.work_dir, {"ffn", *job.budget.channel_parts}
    if statistics.sensitivity is not None and all(map(statistics.sensitivity.of_part, parts)):
        return statistics
    if not follow_sensitivity(job.criterion, job.fits):
        return replace(statistics, sensitivity=None)

    def measure() -> dict[str, Any]:
        with work_dir.watch.stage("sensitivity"):
            return asdict(measure_sensitivity(job, statistics, job.draw(), parts))

    # Other windows would be another measurement.
    found = work_dir.once(f"sensitivities-{job.draw().digest[:8]}", measure)
    return replace(statistics, sensitivity=Sensitivity.from_json(found, len(statistics.blocks)))


def measure_sensitivity(
    job: Job, statistics: Statistics, windows: Windows, parts: Collection[Part]
) -> Sensitivity:
    """Return the sensitivity of blocks, on the beginnings of a few windows of every text."""
    source, tokens_NT = job.source, few_beginnings(windows).tokens_NT
    kept_U = []
    for unit, observed in zip(source.units, statistics.units, strict=True):
        width = max(1, round(unit.width * (1 - SENSITIVITY_SPARSITY)))
        kept_U.append(choose_channels(source, unit, observed, width, job.criterion))
    model = load_whole(source, job.runtime, "measuring the sensitivity of blocks")
    of_part: dict[str, Sensitivity] = {}
    for part, found_L in block_sensitivities(source, model, tokens_NT, kept_U, parts).items():
        if not all(map(math.isfinite, found_L)):
            raise no_number("the model predicts NaN", job.runtime.dtype)
        kept_L, all_L = ([0] * len(found_L) for _ in range(2))
        for unit, kept_K in zip(source.units, kept_U, strict=True):
            if unit.part == part:
                kept_L[unit.block] += len(kept_K)
                all_L[unit.block] += unit.width * unit.ffns
        of_part[part] = Sensitivity(
            # Equal predictions may differ by rounding, in either direction.
            tuple(max(0.0, divergence) for divergence in found_L),
            tuple(k / a if a else 1.0 for k, a in zip(kept_L, all_L, strict=True)),
            len(tokens_NT),
        )
    return replace(of_part.pop("ffn"), other_parts=of_part)
