"""Blocks that go together: each time the one whose absence changes the predictions least."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import pytest
import torch

from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.errors import UnsupportedModelError
from cfsp.planning.candidate import NOTHING, Droppable, Dropped
from cfsp.selection import drop_order
from cfsp.selection.constraint import DropBudget
from cfsp.selection.divergence import dense_predictions
from cfsp.selection.drop_order import order_of_removal
from cfsp.selection.masks import masked_unit
from cfsp.streaming.stand_in import PLAIN, skipped
from tiny_decoders import tiny_model

BLOCKS = 5


def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (5, 16), generator=torch.Generator().manual_seed(0))


def without(source: LoadedModel, removed: Dropped) -> float:
    """Return the divergence without blocks and attentions, without resuming anywhere."""
    model = source.model
    blocks = blocks_of(model, source.architecture)
    units = {unit.block: unit for unit in source.units if unit.part == "kv"}
    with torch.inference_mode(), ExitStack() as stack:
        dense = dense_predictions(model, tokens())
        for block in removed.attentions:
            stack.enter_context(masked_unit(blocks[block], units[block], ()))
        stack.enter_context(skipped(blocks, removed.blocks, PLAIN))
        return dense.divergence(model)


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS))


def order_of(
    source: LoadedModel, count: int, check: Callable[[Dropped], None] = lambda removed: None
) -> list[Removal]:
    wanted = DropBudget.of_count(source, "blocks", count)
    return order_of_removal(source, source.model, tokens(), [wanted], check)


def test_the_first_is_the_best_of_all_and_so_on(source: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    order = order_of(source, 3)
    gone: list[int] = []
    for count, found in enumerate(order):
        gone.append(found.block)
        assert found.divergence == pytest.approx(
            without(source, Dropped(tuple(sorted(gone)))), rel=1e-4
        )
        if count == 0:
            others = [without(source, Dropped((block,))) for block in range(BLOCKS)]
            assert found.block == min(range(BLOCKS), key=others.__getitem__)
    # The model is as it was.
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert without(source, NOTHING) == pytest.approx(0.0, abs=1e-5)


def test_what_the_model_cannot_do_without_stays(source: LoadedModel) -> None:
    first, second = order_of(source, 2)

    def check(removed: Dropped) -> None:
        if {first.block, second.block} & {*removed.blocks}:
            raise UnsupportedModelError("it is needed")

    assert not {first.block, second.block} & {each.block for each in order_of(source, 2, check)}
    with pytest.raises(UnsupportedModelError, match="it is needed"):
        order_of(source, BLOCKS - 1, check)


@pytest.fixture(scope="module")
def both() -> LoadedModel:
    """A model whose last attentions do little."""
    model = tiny_model("llama", num_hidden_layers=BLOCKS)
    for block in (3, 4):
        model.model.layers[block].self_attn.o_proj.weight.data *= 0.1
    return LoadedModel(model, ("attention", "blocks"))


def test_blocks_and_attentions_are_compared_for_each_parameter(both: LoadedModel) -> None:
    wanted = DropBudget.of_share(both, ("attention", "blocks"), 0.7)
    order = order_of_removal(both, both.model, tokens(), [wanted], lambda removed: None)
    gone = NOTHING
    for count, found in enumerate(order):
        added = {
            droppable: without(both, gone.plus(droppable)) - without(both, gone)
            for droppable in wanted.sizes.droppable(gone)
            if wanted.has_room_for(gone, droppable)
        }
        price_of = {
            droppable: each / wanted.sizes.parameters_with(gone, droppable)
            for droppable, each in added.items()
        }
        chosen = found.part, found.block
        if count == 0:  # later ones are not all tried again
            assert chosen == min(price_of, key=price_of.__getitem__)
        gone = gone.plus(chosen)
        assert found.divergence == pytest.approx(without(both, gone), rel=1e-3)
    assert {each.part for each in order} == {"attention", "blocks"}
    missing = wanted.parameters - wanted.sizes.parameters(gone)
    assert abs(missing) <= wanted.sizes.largest / 2
    # With a block goes what is left of it.
    assert any(
        (each.part, other.part) == ("attention", "blocks") and each.block == other.block
        for each, other in combinations(order, 2)
    )


def test_only_a_few_are_tried_again(source: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price is one try for each block, and a few for each that goes."""
    tried: list[Droppable] = []
    original = drop_order._divergence_without

    def note(masked: Any, gone: Dropped, droppable: Droppable) -> float:
        tried.append(droppable)
        return original(masked, gone, droppable)

    monkeypatch.setattr(drop_order, "_divergence_without", note)
    monkeypatch.setattr(drop_order, "_TRIED_AGAIN", 1)
    order = order_of(source, 3)
    assert len(order) == 3
    assert len(tried) <= BLOCKS + 2 * 1
    assert order[0] == order_of(source, 1)[0]
