"""What is told to stay loses nothing, and the others pay for it."""

import logging
from contextlib import nullcontext

import pytest

import cfsp
from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import BudgetError, UsageError
from cfsp.planning.candidate import Dropped, DropSizes, kept_by
from cfsp.planning.make import model_size, parameters_of_channels
from cfsp.selection.constraint import Parameters
from cfsp.settings import Budget
from ragged import cut
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model

BLOCKS = 5


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS), ("ffn", "kv", "blocks"))


def test_numbers_are_blocks_and_words_are_patterns(source):
    names = [(unit.block, unit.part) for unit in source.units]
    assert {names[i] for i in kept_by(source, ("1",)).units} == {(1, "ffn"), (1, "kv")}
    found = kept_by(source, ("model.layers.[03].self_attn", "4"))
    assert {names[i] for i in found.units} == {(0, "kv"), (3, "kv"), (4, "kv"), (4, "ffn")}
    assert found.blocks == {0, 3, 4}
    with pytest.raises(UsageError, match=r"--keep names block 5, and .* has the blocks 0 to 4"):
        kept_by(source, ("5",))
    with pytest.raises(UsageError, match="--keep names block 1000"):
        kept_by(source, (f"1{'0' * 5000}",))  # longer than Python reads numbers
    with pytest.raises(UsageError, match=r"fits no module .* such are model\.layers\.0\."):
        kept_by(source, ("lm_head",))


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_a_command_that_keeps_blocks(prune, repair):
    plan = prune("--sparsity", 0.3, "--keep", 0, "--repair", repair).plan
    first, *others = plan.units
    assert first.kept_width == first.width
    assert all(unit.kept_width < unit.width for unit in others)
    assert plan.ffn_sparsity == pytest.approx(0.3, abs=0.03)
    assert plan.criterion["keep"] == ["0"]


@pytest.mark.parametrize("removal", ["divergence", "runs"])
def test_blocks_that_stay_are_not_dropped(source, tokenizer, few, removal, monkeypatch):
    monkeypatch.setattr("cfsp.job.fits", lambda *_: removal == "divergence")
    asked = {"parts": "blocks", "remove": 2, "effort": "fast", **few}
    found = [
        cfsp.prune(source.model, tokenizer, keep=keep, **asked).config.cfsp["removed_blocks"]
        for keep in ((), (1, 2, 3))
    ]
    assert found[1] == [0, 4] != found[0]


def test_an_ffn_that_stays_keeps_its_block_and_not_its_attention(source):
    alone = DropSizes.of(source, "attention", ("model.layers.*.mlp",))
    assert sorted(alone.size_of) == list(range(BLOCKS)) and not alone.some_stay
    assert not alone.left(range(BLOCKS - 1))
    keep = ("model.layers.0.mlp", "2")
    blocks, attentions = (DropSizes.of(source, part, keep) for part in ("blocks", "attention"))
    assert sorted(blocks.size_of) == [1, 3, 4] and sorted(attentions.size_of) == [0, 1, 3, 4]
    assert blocks.left([1, 3]) == {4} and attentions.left([0, 1, 4]) == {3}


def test_channels_give_all_where_no_block_may_go(source):
    keep = ("*.self_attn",)  # whose blocks stay then
    constraint = Parameters(source, Budget(parts=("ffn", "kv", "blocks"), keep=keep), 0.8)
    constraint.check()
    assert constraint.to_drop().is_met_by(())


def test_blocks_give_what_channels_that_may_go_do_not_reach(tokenizer, few, caplog):
    """However few of all channels that would be."""
    caplog.set_level(logging.INFO)
    model = tiny_model("llama", num_hidden_layers=8)
    found = cfsp.prune(model, tokenizer, target_params=0.85, keep="0,1,2,3,4,5", **few)
    assert found.config.cfsp["removed_blocks"]
    assert "all FFN channels that may go would not be enough" in caplog.text


def test_widths_are_multiples_whichever_blocks_go(tokenizer, tmp_path):
    wide = build_tiny_model("llama", intermediate_size=1056)
    source = cut(wide, tokenizer, tmp_path, (1056, 736, 608))
    whole, less = (model_size(source, dropped=Dropped(gone)).multiple_U for gone in ((), (0,)))
    assert less == whole[1:]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.9, nullcontext()),
        (1.1, pytest.raises(BudgetError, match="of the model's parameters with")),
    ],
)
def test_of_the_last_block_its_channels_may_go(source, share, expected):
    """More than all other blocks was refused, though channels are beside them."""
    goes = DropSizes.of(source, "blocks").most
    goes += share * parameters_of_channels(source, ("ffn",)) / BLOCKS
    asked = 1 - goes / source.parameter_count
    with expected:
        Parameters(source, Budget(parts=("ffn", "blocks")), asked).check()


@pytest.mark.parametrize(
    ("parts", "keep", "ways"),
    [("ffn,blocks", "0,1", "remove less, or --keep less$"), ("kv,blocks", (), "remove less$")],
)
def test_a_size_out_of_reach_is_refused_before_any_pass(source, parts, keep, ways):
    message = f"cannot remove 90.0% of .* with --parts {parts}.*; {ways}"
    with pytest.raises(BudgetError, match=message):
        Parameters(source, Budget(parts=parts, keep=keep), 0.1).check()


def test_more_than_the_others_own_is_refused(source, tokenizer, few):
    with pytest.raises(BudgetError, match=r"30\.0% of the block parameters: what --keep names"):
        cfsp.prune(source.model, tokenizer, parts="blocks", sparsity=0.3, keep="0,1,2,3,4", **few)
    with pytest.raises(BudgetError, match="what --keep names must stay; between 0 and 2"):
        cfsp.prune(source.model, tokenizer, parts="blocks", remove=3, keep="0,1,2", **few)
    with pytest.raises(BudgetError, match="every FFN and all that --keep names, between 0 and"):
        cfsp.prune(source.model, tokenizer, sparsity=0.5, keep="0,1,2,3", multiple=8, **few)
    with pytest.raises(UsageError, match="--keep is not for --parts experts"):
        Budget(0.5, parts=("experts",), keep=("0",))
