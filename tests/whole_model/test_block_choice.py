"""Blocks that go together: each time the one whose absence changes the predictions least."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch

from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.call_form import PLAIN
from cfsp.engine.resumed_forward import skipped
from cfsp.errors import UnsupportedModelError
from cfsp.families.tiny import tiny_model
from cfsp.planning.block_budget import BlockBudget, RemovedWhole
from cfsp.settings import Budget
from cfsp.whole_model.block_choice import order_of_removal
from cfsp.whole_model.divergence import dense_predictions

BLOCKS = 5


def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (5, 16), generator=torch.Generator().manual_seed(0))


def divergence_without(source: LoadedModel, removed: Collection[int]) -> float:
    """Return it without resuming anywhere, all windows at once."""
    model = source.model
    with torch.inference_mode():
        dense = dense_predictions(model, tokens())
        with skipped(blocks_of(model, source.architecture), removed, PLAIN):
            return dense.divergence(model)


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS))


def order_of(
    source: LoadedModel, count: int, check: Callable[[RemovedWhole], None] = lambda removed: None
) -> list[Removal]:
    wanted = BlockBudget.of(source, Budget(parts=("blocks",), remove_blocks=count))
    return order_of_removal(source, source.model, tokens(), [wanted], check)


def test_the_first_is_the_best_of_all_and_so_on(source: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    order = order_of(source, 3)
    gone: list[int] = []
    for count, found in enumerate(order):
        gone.append(found.block)
        assert found.divergence == pytest.approx(divergence_without(source, gone), rel=1e-4)
        if count == 0:
            others = [divergence_without(source, [block]) for block in range(BLOCKS)]
            assert found.block == min(range(BLOCKS), key=others.__getitem__)
    # The model is as it was.
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert divergence_without(source, []) == pytest.approx(0.0, abs=1e-5)


def test_what_the_model_cannot_do_without_stays(source: LoadedModel) -> None:
    first, second = order_of(source, 2)

    def check(removed: RemovedWhole) -> None:
        if {first.block, second.block} & {*removed.blocks}:
            raise UnsupportedModelError("it is needed")

    assert not {first.block, second.block} & {each.block for each in order_of(source, 2, check)}
    with pytest.raises(UnsupportedModelError, match="it is needed"):
        order_of(source, BLOCKS - 1, check)
