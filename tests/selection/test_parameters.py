"""What may go for a goal of parameters where nobody said it."""

import logging
import re
from dataclasses import replace
from typing import Any

import pytest

from builders import job_of
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.errors import BudgetError
from cfsp.planning.allocation import allocate
from cfsp.planning.candidate import Dropped
from cfsp.planning.make import model_size
from cfsp.selection.constraint import Parameters
from cfsp.selection.goal import MANY_CHANNELS, constraint_of
from cfsp.settings import Budget, Compute, Part, PruneSettings, TargetParameters
from tiny_decoders import tiny_model

OPEN = PruneSettings(Budget(multiple=8), compute=Compute("cpu", "float32"), leaves_parts_open=True)


def stays_without(source: WeightSource, share: float) -> float:
    """Return what stays of the parameters where a share of the FFN channels goes."""
    size = model_size(source)
    owned = size.of_parts(["ffn"])
    return 1 - share * owned.cost_of(owned.width_U) * owned.parameters_per_cost / size.parameters


def parts_of(source: WeightSource, stays: float, **settings: Any) -> tuple[str, ...]:
    """Return what may go, which is found out before any text is drawn."""
    asked = replace(OPEN, goal=TargetParameters(stays), **settings)
    job, _ = constraint_of(job_of(source, asked))
    return job.budget.parts


def test_blocks_are_tried_where_many_channels_would_go(source, caplog):
    caplog.set_level(logging.INFO)
    assert parts_of(source, stays_without(source, MANY_CHANNELS - 0.01)) == ("ffn",)
    assert not caplog.text
    assert parts_of(source, stays_without(source, MANY_CHANNELS + 0.01)) == ("ffn", "blocks")
    assert "41% of the FFN channels would go alone: whole blocks are tried" in caplog.text
    # More than the channels own.
    assert parts_of(source, stays_without(source, 1.1)) == ("ffn", "blocks")
    assert "all FFN channels would not be enough" in caplog.text


def test_channels_go_alone_where_blocks_cannot_be_compared(source, caplog, monkeypatch):
    stays = stays_without(source, 0.6)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("cfsp.job.fits", lambda *_: False)
    assert parts_of(source, stays) == ("ffn",)
    assert (
        "60% of the FFN channels would go alone, and there is no memory for a pruned model beside "
        "the dense one: whole blocks are not tried"
    ) in caplog.text


@pytest.mark.parametrize(
    ("name", "config"),
    # Each block of the first has an embedding of its own.
    [("gemma3n_text", {"num_kv_shared_layers": 0}), ("llama", {"num_hidden_layers": 1})],
)
def test_channels_go_alone_where_no_block_can(name, config):
    source = LoadedModel(tiny_model(name, **config))
    for share in (0.6, 0.9):
        assert parts_of(source, stays_without(source, share)) == ("ffn",)


def test_blocks_are_tried_where_one_can_go():
    """The last block of the model has its only attention, and its class no cache without one."""
    source = LoadedModel(tiny_model("jamba"))
    assert parts_of(source, stays_without(source, 0.6)) == ("ffn", "blocks")


def test_blocks_that_stay_let_all_others_go(source):
    """Of three blocks the first stays: a third of the parameters is more than one block."""
    kept = replace(OPEN.budget, keep=("0",))
    assert parts_of(source, stays_without(source, 0.7), budget=kept) == ("ffn", "blocks")


def test_what_neither_channels_nor_blocks_own_is_refused(source):
    told = r"--parts ffn,blocks, neither .* nor of all together \(less than (.*)% can"
    with pytest.raises(BudgetError, match=told) as error:
        parts_of(source, 0.05)
    (most,) = re.findall(r"less than (.*)%", str(error.value))
    # What blocks alone do not own, both together may: of three blocks two can go.
    alone = 1 - 2 * parameters_of_blocks(source)[0] / source.parameter_count
    beyond = 1 - float(most) / 100 + 0.01
    assert beyond < alone - 0.02
    for stays in (alone - 0.02, beyond):
        assert parts_of(source, stays) == ("ffn", "blocks")


def test_a_command_that_names_no_parts(prune, source):
    stays = round(stays_without(source, 0.6), 4)
    asked = ("--target-params", stays, "--effort", "fast")
    # One pass, without trying anything; so it is said.
    done = prune(*asked, name="fast")
    assert done.manifest["goal"]["chosen"]["parts"] == ["ffn"]
    assert "blocks are tried" not in done.error
    done = prune("--target-params", stays, name="open")
    assert done.manifest["criterion"]["parts"] == ["ffn", "blocks"]
    left = done.manifest["parameters_after"] / done.manifest["parameters_before"]
    assert abs(left - stays) < 0.02
    assert "60.0% of the FFN channels: divergence" in done.error
    assert "1 block and" in done.error
    error = prune("--target-params", stays, "--dry-run", name="dry").error
    assert "--dry-run compared plans before repair" in error


def test_nothing_of_a_part_is_left_where_all_blocks_that_have_it_are_dropped():
    """One block of a hybrid has an attention: without it there is no KV group to lose."""
    parts: tuple[Part, ...] = ("kv", "blocks")
    source = LoadedModel(tiny_model("nemotron_h"), parts)
    (block,) = {unit.block for unit in source.units if unit.part == "kv"}
    dropped = Dropped((block,))
    planner: Any = None
    for stays, share in ((0.99, 0.0), (0.5, None)):
        constraint = Parameters(source, Budget(parts=parts), stays)
        assert constraint.share(planner, ("kv",), dropped) == share
    size = model_size(source, dropped=dropped)
    assert allocate([1.0] * len(size.units), Budget(parts=("kv",)), size) == size.width_U


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_target_params(prune, repair):
    done = prune("--target-params", 0.75, "--parts", "ffn", "--repair", repair)
    before, after = (done.manifest[f"parameters_{when}"] for when in ("before", "after"))
    assert abs(after - 0.75 * before) <= 8 * 3 * 32  # one multiple
    goal, sparsity = done.manifest["goal"], done.manifest["ffn_sparsity"]
    assert (goal["goal"], goal["asked"]) == ("target_params", 0.75)
    assert goal["chosen"]["parts"] == ["ffn"]
    assert goal["chosen"]["sparsity"] == pytest.approx(sparsity, 0.05)
    assert "0.75 of all parameters" in done.card


def test_target_params_in_equal_widths(prune):
    done = prune("--target-params", 0.75, "--widths", "equal")
    assert len(set(done.manifest["intermediate_sizes"])) == 1
    assert done.manifest["criterion"]["block_metric"] == "uniform"
