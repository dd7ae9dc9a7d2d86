"""What a whole model predicts without some of its parts: masked, alone, and in an order."""

import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from builders import draw_windows, job_of, numpy_divergence, random_tokens
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.errors import UnsupportedModelError
from cfsp.planning.candidate import Dropped
from cfsp.selection import divergence, drop_order
from cfsp.selection.constraint import DropBudget, half_dropped
from cfsp.selection.divergence import (
    POSITION_STRIDE,
    DensePredictions,
    MaskedModel,
    block_sensitivities,
    dense_predictions,
    masked_channels,
    masked_unit,
    measure_sensitivity,
)
from cfsp.selection.drop_order import order_of_removal
from cfsp.settings import UNIT_PARTS, Budget, Compute, PruneSettings
from cfsp.streaming.stand_in import PLAIN, skipped
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, WIDTH, build_tiny_model

TOKENS = random_tokens(5, 16)


@torch.inference_mode()
def test_blocks_that_are_not_named_stay_dense():
    """That masked is cut architecture_contract.py checks."""
    model = build_tiny_model("llama")
    source, dense_BTV = LoadedModel(model), model(TOKENS).logits
    for nothing in ({}, {1: tuple(range(WIDTH))}):
        with masked_channels(source, model, nothing):
            assert torch.equal(model(TOKENS).logits, dense_BTV)
    with pytest.raises(KeyboardInterrupt), masked_channels(source, model, {0: (1,)}):
        raise KeyboardInterrupt
    assert torch.equal(model(TOKENS).logits, dense_BTV)


def test_the_only_block_with_a_router_may_go_where_its_logits_are_asked_for():
    asked = {"output_router_logits": True, "num_hidden_layers": 2, "mlp_only_layers": [0]}
    model = tiny_model("qwen2_moe", **asked)
    masked = MaskedModel(LoadedModel(model), model, [TOKENS])
    assert 0 < masked.divergence(Dropped((1,))) < math.inf


# Sensitivity: one block masked at a time, from kept hidden states as from the beginning.


def test_divergence_is_that_of_numpy():
    model, tokens_BT = build_tiny_model("llama"), random_tokens(2, 12)
    with torch.inference_mode():
        dense_BTV = model(tokens_BT).logits
        dense = dense_predictions(model, tokens_BT)
        assert dense.divergence(model) == pytest.approx(0, abs=1e-6)
        with masked_channels(LoadedModel(model), model, {0: (1, 2, 3)}):
            changed_BTV = model(tokens_BT).logits
            found = dense.divergence(model)
    expected_BT = numpy_divergence(dense_BTV, changed_BTV)[:, ::POSITION_STRIDE]
    assert found == pytest.approx(expected_BT.mean(), rel=1e-4)
    assert found > 0.01


def test_a_model_is_at_no_distance_from_itself(monkeypatch):
    """However many and large its logits are: by that it is known whether blocks can be resumed."""
    model = build_tiny_model("llama")
    logits_BPV = 40 + 4 * torch.randn(2, 8, 50_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(divergence, "_logits", lambda *_: logits_BPV)
    assert dense_predictions(model, TOKENS).divergence(model) == 0


# Blocks that return tuples, are called by position, have masks of two kinds, keys and values from
# an earlier block, several FFNs, or none.
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "falcon", "gemma3n_text", "qwen3_next", "nemotron_h", "gemma3"]
)
def test_each_block_is_masked_alone(name, noted, monkeypatch):
    model = tiny_model(name)
    source = LoadedModel(model)
    # Two windows at once, and the third alone.
    monkeypatch.setattr(divergence, "_TOKENS_AT_ONCE", 30)
    tokens_NT = random_tokens(3, 12, seed=1)
    kept_U = [tuple(range(0, unit.width * unit.ffns, 2)) for unit in source.units]
    starts = noted(divergence, "resumed_at", lambda blocks, first, *_: first)
    found_L = block_sensitivities(source, model, tokens_NT, kept_U)["ffn"]
    count = len(blocks_of(model, source.architecture))
    with_units = sorted({unit.block for unit in source.units})
    with torch.inference_mode():
        dense_N = [dense_predictions(model, tokens_T[None]) for tokens_T in tokens_NT]
        for block in range(count):
            kept = {i: kept_U[i] for i, unit in enumerate(source.units) if unit.block == block}
            with masked_channels(source, model, kept):
                expected = sum(dense.divergence(model) for dense in dense_N) / len(dense_N)
            assert found_L[block] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # From the first block on is the whole model; at the last it is tried whether that can be.
    resumed = [block for block in with_units if block and name != "gemma3n_text"]
    assert starts == 2 * [count - 1, *resumed]


def test_what_stayed_is_stored_by_part(text_file, tokenizer):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    source = LoadedModel(tiny_model("llama", hidden_size=48, **heads), ("ffn", "kv"))
    windows = draw_windows([str(text_file)], tokenizer, samples=2, seqlen=16)
    job = job_of(source, PruneSettings(Budget(), compute=Compute("cpu")))
    statistics = calibrate(job, windows)
    of_ffns = measure_sensitivity(job, statistics, windows, UNIT_PARTS)
    assert of_ffns.kept_L == (1 / 2,) * BLOCKS
    assert of_ffns.other_parts["kv"].kept_L == (2 / 3,) * BLOCKS


# Blocks that go together: each time the one whose absence changes the predictions least.


DEPTH = 5


def without(source: LoadedModel, dense: DensePredictions, removed: Dropped) -> float:
    """Return the divergence without blocks or attention layers, without resuming anywhere."""
    model = source.model
    blocks = blocks_of(model, source.architecture)
    units = {unit.block: unit for unit in source.units if unit.part == "kv"}
    with torch.inference_mode(), ExitStack() as stack:
        for block in removed.attentions:
            stack.enter_context(masked_unit(blocks[block], units[block], ()))
        stack.enter_context(skipped(blocks, removed.blocks, PLAIN))
        return dense.divergence(model)


def order_of(source: LoadedModel, count: int) -> list[Removal]:
    wanted = DropBudget.of_count(source, Budget(parts=("blocks",)), count)
    return order_of_removal(source, source.model, TOKENS, wanted)


def test_statistics_have_as_much_as_can_go():
    """Two of three attention layers have a sliding window, and one of each kind must stay."""
    budget, model = Budget(parts=("attention",)), build_tiny_model("gemma3_text")
    source = LoadedModel(model, budget.parts)
    half = half_dropped(source, budget)
    (removal,) = order_of_removal(source, model, TOKENS, half)
    assert removal.block in (0, 1)
    assert half.taken([removal.block]) == [removal.block] and not half.is_met_by([removal.block])
    with pytest.raises(UnsupportedModelError, match="at least one of the kind full_attention"):
        order_of_removal(source, model, TOKENS, replace(half, at_most=False))


def test_what_the_model_cannot_do_without_stays(five_blocks, monkeypatch):
    first, second = order_of(five_blocks, 2)

    def check(source: LoadedModel, removed: Dropped) -> None:
        if {first.block, second.block} & {*removed.blocks}:
            raise UnsupportedModelError("it is needed")

    monkeypatch.setattr(drop_order, "check_can_go", check)
    assert not {first.block, second.block} & {each.block for each in order_of(five_blocks, 2)}
    with pytest.raises(UnsupportedModelError, match="it is needed"):
        order_of(five_blocks, DEPTH - 1)


@pytest.fixture(scope="module")
def uneven() -> LoadedModel:
    """A model whose last attention layers do little."""
    model = tiny_model("llama", num_hidden_layers=DEPTH)
    for block in (3, 4):
        model.model.layers[block].self_attn.o_proj.weight.data *= 0.1
    return LoadedModel(model, ("attention", "blocks"))


@pytest.mark.parametrize("part", ["attention", "blocks"])
def test_the_cheapest_for_each_parameter_goes_first(uneven, part):
    wanted = DropBudget.of_share(uneven, Budget(parts=(part,)), 0.7)
    # As if blocks differed in size.
    size_of = {block: size * (1 + block) for block, size in wanted.sizes.size_of.items()}
    sizes = replace(wanted.sizes, size_of=size_of)
    wanted = replace(wanted, sizes=sizes, wanted=0.7 * sum(size_of.values()))
    before = {name: tensor.clone() for name, tensor in uneven.model.state_dict().items()}
    order = order_of_removal(uneven, uneven.model, TOKENS, wanted)
    assert all(torch.equal(uneven.model.state_dict()[name], before[name]) for name in before)
    gone, dense = list[int](), dense_predictions(uneven.model, TOKENS)
    # The first is the cheapest of all that has room; later ones are not all tried again.
    price_of = {
        block: without(uneven, dense, wanted.dropped([block])) / size_of[block]
        for block in wanted.room(gone)
    }
    assert order[0].block == min(price_of, key=price_of.__getitem__)
    for found in order:
        assert found.part == part
        gone.append(found.block)
        divergence = without(uneven, dense, wanted.dropped(gone))
        assert found.divergence == pytest.approx(divergence, rel=1e-3)
    assert len(gone) > 1 and wanted.is_met_by(gone)


def test_only_a_few_are_tried_again(five_blocks, monkeypatch, noted):
    """The price is one try for each block, and a few for each that goes."""
    tried = noted(drop_order, "_divergence_without", lambda masked, gone, last: last)
    monkeypatch.setattr(drop_order, "_TRIED_AGAIN", 1)
    order = order_of(five_blocks, 3)
    assert len(order) == 3
    assert len(tried) <= DEPTH + 2 * 1
    assert order[0] == order_of(five_blocks, 1)[0]
