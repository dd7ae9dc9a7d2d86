"""A model without some of its parts, uncut: weights that read pruned channels are zero meanwhile.

What a plan costs can so be measured on one model in memory, plan after plan, without writing a
checkpoint. All other weights stay as they are, so the result is that of `--repair none`. Blocks
that go are skipped: the hidden state passes them unchanged.

Shapes: B windows, T tokens, D hidden, F FFN channels, K kept, P pruned, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.architecture.expert_proof import masked_experts
from cfsp.architecture.found import Unit
from cfsp.architecture.resizing import Gone
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.planning.candidate import NOTHING, Dropped
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.perplexity import perplexity
from cfsp.selection.divergence import call_form_of, can_resume, dense_predictions
from cfsp.streaming.stand_in import CallForm, hidden_states_entering, resumed_at, skipped
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    KeptChannels = Mapping[int, Sequence[int]]


class MaskedModel:
    """A whole model that runs on the same windows again and again, without some of its parts.

    With `resumes` it keeps what enters every block, so that those before a changed one need not
    compute again; models whose blocks need more of earlier ones compute all the same.
    """

    def __init__(
        self,
        source: WeightSource,
        model: PreTrainedModel,
        batches: Iterable[Tensor],
        *,
        resumes: bool = False,
        form: CallForm | None = None,
    ) -> None:
        self._source, self._model = source, model
        self._blocks = blocks_of(model, source.architecture)
        self.form = form or call_form_of(model, self._blocks)
        self._dense, self._entering = [], []
        with torch.inference_mode():
            for tokens_BT in batches:
                noted: AbstractContextManager[list[Tensor]] = nullcontext([])
                if resumes:
                    noted = hidden_states_entering(self._blocks)
                with noted as entering_L:
                    self._dense.append(dense_predictions(model, tokens_BT))
                self._entering.append(entering_L)
            self._resumes = resumes and can_resume(
                model, self._blocks, self._entering[0][-1], self.form, self._dense[0]
            )

    @contextmanager
    def _without(self, dropped: Dropped, kept: KeptChannels) -> Iterator[None]:
        units = self._source.units
        gone = {
            index: ()
            for index, unit in enumerate(units)
            if unit.part == "kv" and unit.block in dropped.attentions
        }
        masks = {
            index: kept_K
            for index, kept_K in {**gone, **kept}.items()
            if units[index].block not in dropped.blocks
            and len(kept_K) < units[index].ffns * units[index].width
        }
        with (
            masked_channels(self._source, self._model, masks),
            skipped(self._blocks, dropped.blocks, self.form),
        ):
            yield

    def note_entering(self, dropped: Dropped) -> None:
        """Note what enters every block when some are gone."""
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
                given = (
                    resumed_at(self._blocks, first, entering_L[first], self.form)
                    if first
                    else nullcontext()
                )
                with given:
                    total += dense.divergence(self._model) * len(dense.tokens_BT)
                windows += len(dense.tokens_BT)
        return total / windows


def masked_loss(
    source: WeightSource,
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Windows,
    label: str = "eval",
) -> float:
    """Return the mean negative log-likelihood of a model under a plan, in nats per token.

    It is that of the pruned model before repair, up to rounding.
    """
    with masked_channels(source, model, dict(enumerate(plan.kept_channels))):
        return math.log(perplexity(model, windows, label).value)


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
    saved: list[Tensor] = []

    def put_back() -> None:
        # Fewer are saved than there are where the loop was interrupted.
        for matrix, pruned_P, columns in zip(matrices, pruned, saved, strict=False):
            matrix.index_copy_(axis, pruned_P, columns)

    staying = (~is_pruned_EF).any(1).nonzero().flatten().tolist()
    with ExitStack() as stack:
        stack.callback(put_back)
        if 0 < len(staying) < unit.ffns and unit.expert_axes:
            stack.enter_context(masked_experts(block, unit, staying))
        for matrix, pruned_P in zip(matrices, pruned, strict=True):
            saved.append(matrix.index_select(axis, pruned_P))
            matrix.index_fill_(axis, pruned_P, 0)
        yield
