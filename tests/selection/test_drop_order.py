"""Which blocks go whole, from statistics, and when they are enough."""

from dataclasses import replace
from itertools import accumulate, combinations
from typing import Any

import pytest
import torch

import cfsp
from builders import job_of, statistics_with_distances
from cfsp.calibration.statistics import Removal, RunDistances, Statistics
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.stored_blocks import names_without_blocks, parameters_of_blocks
from cfsp.errors import BudgetError, StatisticsError, UnsupportedModelError
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.processes import Team
from cfsp.selection import drop_order
from cfsp.selection.constraint import DropBudget
from cfsp.selection.drop_order import cheapest_runs, gone_by
from cfsp.settings import Budget, PruneSettings
from cfsp.streaming.work_dir import WorkDir
from tiny_decoders import tiny_model

BLOCKS = 6
OF_BLOCKS = Budget(parts=("blocks",))


def random_runs(seed: int, blocks: int = BLOCKS) -> RunDistances:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(blocks + 1, blocks + 1, generator=generator).tolist()
    return RunDistances(tuple(map(tuple, sums)), 2)


def cost_of(runs: RunDistances, removed: tuple[int, ...]) -> float:
    """Return the sum over the longest runs of removed blocks."""
    total, start = 0.0, None
    for block in range(BLOCKS + 1):
        if block in removed:
            start = block if start is None else start
        elif start is not None:
            total += runs.between(start, block)
            start = None
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("banned", [(), (0, 3)])
def test_runs_are_the_cheapest_of_all(seed, count, banned):
    runs = random_runs(seed)
    free = [block for block in range(BLOCKS) if block not in banned]
    best = min(combinations(free, count), key=lambda removed: cost_of(runs, removed))
    assert tuple(cheapest_runs(runs, BLOCKS, count, banned)) == best


def test_one_of_several_is_said_so():
    assert Dropped((), (4,)).in_words == "1 attention layer"
    beside = Candidate(Dropped((3, 5)), parts=("ffn", "kv"), sparsity=0.25)
    others = "25.0% of the FFN channels and KV groups of the others"
    assert beside.in_words == f"2 blocks and {others}"
    assert Candidate(parts=("ffn",), sparsity=0.25).in_words == "25.0% of the FFN channels"
    assert Candidate(Dropped((), (4,)), parts=("kv",)).in_words == "1 attention layer"
    assert Candidate(experts=2).in_words == "2 experts of each block"


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS))


def test_a_budget_is_met_to_within_half_a_block(source):
    each = parameters_of_blocks(source)
    assert len(set(each)) == 1
    total = source.parameter_count
    for sparsity, expected in ((0.0, 0), (0.08, 0), (0.09, 1), (0.5, 3), (0.83, 5)):
        budget = DropBudget.of_share(source, OF_BLOCKS, sparsity)
        first = (range(count) for count in range(BLOCKS))
        assert len(next(filter(budget.is_met_by, first))) == expected
    of_model = DropBudget.of_share(source, OF_BLOCKS, 2 * each[0] / total, of_model=True)
    assert of_model.is_met_by((0, 4))
    assert not of_model.is_met_by((0,))
    by_count = DropBudget.of_count(source, OF_BLOCKS, 2)
    assert by_count.is_met_by((1, 2))
    assert not by_count.is_met_by((1,))


def test_an_impossible_budget_names_the_range(source):
    with pytest.raises(BudgetError, match=r"between 0 and 83.3% can be removed"):
        DropBudget.of_share(source, OF_BLOCKS, 0.95)
    with pytest.raises(BudgetError, match="of the model's parameters: at least one of 6"):
        DropBudget.of_share(source, OF_BLOCKS, 0.9, of_model=True)
    with pytest.raises(BudgetError, match="between 0 and 5 can be removed"):
        DropBudget.of_count(source, OF_BLOCKS, 6)


def test_memory_is_looked_at_once_and_by_the_first_process(source, tmp_path, monkeypatch):
    settings = PruneSettings(Budget(0.3, parts=("blocks",)))
    job = job_of(source, settings, work_dir=WorkDir(tmp_path, identity={"of": "one command"}))
    for has_room in (False, True):  # as of a run that is resumed
        monkeypatch.setattr("cfsp.job.fits", lambda *_, now=has_room: now)
        assert not drop_order.follow_divergence(job)
        assert drop_order.follow_runs(job)

    class Second(Team):
        def from_first(self, make: Any) -> Any:
            return {"fits": False}

    other = WorkDir(tmp_path, team=Second(1, 2))
    assert not drop_order.follow_divergence(replace(job, work_dir=other))


def runs_of(*distance_L: float) -> RunDistances:
    """Distances of runs that are the sums over their blocks."""
    sums = [0.0, *accumulate(distance_L)]
    return RunDistances(tuple(tuple(max(b - a, 0.0) for b in sums) for a in sums), 1)


def test_the_choice_follows_the_statistics(source):
    budget = DropBudget.of_share(source, OF_BLOCKS, 1 / 3)
    plain = statistics_with_distances([0.1] * BLOCKS)
    order = (Removal(5, 0.1), Removal(2, 0.3), Removal(0, 0.7))
    measured = replace(plain, removals=order, runs=random_runs(0))
    assert gone_by(source, measured, budget) == [5, 2]
    expected = cheapest_runs(random_runs(0), BLOCKS, 2)
    assert gone_by(source, replace(measured, removals=()), budget) == expected
    nothing = DropBudget.of_share(source, OF_BLOCKS, 0.0)
    assert gone_by(source, plain, nothing) == []
    with pytest.raises(StatisticsError, match="cfsp calibrate --parts blocks"):
        gone_by(source, plain, budget)
    # The order may be of a run without --keep.
    kept = replace(OF_BLOCKS, keep=("5",))
    for own in (DropBudget.of_count(source, kept, 2), DropBudget.of_share(source, kept, 1 / 3)):
        assert gone_by(source, measured, own) == [2, 0]
    # An earlier version had one order of blocks and attention layers.
    together = [{**vars(each), "among": ["attention", "blocks"]} for each in order]
    assert Removal.all_from_json(together, BLOCKS) == ()
    more = DropBudget.of_share(source, OF_BLOCKS, 0.8)
    with pytest.raises(StatisticsError, match="say of 3 blocks in which order they go"):
        gone_by(source, measured, more)


@pytest.mark.parametrize("distance_L", [(0.9, 0.8, 0.3, 0.1), (0.9, 0.1, 0.3, 0.8)])
def test_a_block_that_cannot_go_is_left_out(distance_L):
    """Every second block has experts, by a rule that one block fewer breaks but for the last."""
    source = LoadedModel(tiny_model("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2))
    plain = statistics_with_distances(distance_L)
    statistics = replace(plain, runs=runs_of(*distance_L))
    budget = DropBudget.of_count(source, OF_BLOCKS, 1)
    assert gone_by(source, statistics, budget) == [3]


def test_statistics_keep_what_the_choice_needs(model, few, tmp_path, monkeypatch):
    statistics = cfsp.calibrate(model, parts="blocks", **few)
    assert len(statistics.removals) == 2  # half of three, to within half a block
    statistics.save(tmp_path / "s")
    assert Statistics.load(tmp_path / "s").removals == statistics.removals
    asked = {"sparsity": 0.3, "parts": "blocks"}
    plan = cfsp.plan(model, statistics, **asked)
    assert plan.removed_blocks == (statistics.removals[0].block,)
    assert plan.criterion["of"] == "blocks"
    report = cfsp.prune(model, out=tmp_path / "o", effort="fast", **asked, **few)
    assert report.plan.removed_blocks == plan.removed_blocks

    monkeypatch.setattr("cfsp.job.fits", lambda *_: False)
    by_runs = cfsp.prune(model, out=tmp_path / "r", effort="fast", **asked, **few)
    kept = Statistics.load(tmp_path / "r" / "cfsp.statistics")
    assert kept.runs is not None and not kept.removals
    for block, distance in enumerate(kept.distance_L):
        # Of a part of the tokens.
        assert kept.runs.between(block, block + 1) == pytest.approx(distance, rel=0.1)
    assert by_runs.plan.removed_blocks == tuple(cheapest_runs(kept.runs, 3, 1))


def test_names_of_stored_tensors_that_share_a_block_are_refused(source):
    of_four, of_one = (f"model.layers.{block}.mlp.up_proj.weight" for block in (4, 1))
    stored = replace(source.stored, tied={of_four: of_one})
    sharing = LoadedModel(source.model)
    sharing.stored = stored
    with pytest.raises(UnsupportedModelError, match=r"block 1 .* can't be removed: model.layers.4"):
        names_without_blocks(sharing, (1,))
    renamed = names_without_blocks(sharing, (1, 4))
    assert renamed[of_four.replace("4", "5")] == of_four.replace("4", "3")
