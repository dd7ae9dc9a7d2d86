"""A model with an FFN of experts and a shared one in a block, none in the next, a dense one last.

It is a mixture of experts, some of whose FFN units are left out.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import draw_windows, job_of
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import FileTensor
from cfsp.cli.output import print_plan
from cfsp.cut.surgery import PrunedSource
from cfsp.decide import decide
from cfsp.errors import PlanError
from cfsp.planning.make import model_size
from cfsp.planning.plan_file import PruningPlan
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge_pass import gram_bytes
from cfsp.result.making import steps_in_words
from cfsp.settings import Budget, Compute, PruneSettings
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from tiny_models import build_tiny_model

BUDGET = Budget(0.4, multiple=8)
SHARED = "mlp.shared_expert"
EXPERTS = "mlp.experts"
# The block and the module of every unit.
PLACES = [(0, EXPERTS), (0, SHARED), (2, SHARED)]


def with_units(source: Any, places: Sequence[tuple[int, str]]) -> Any:
    """Leave only some of the FFN units of a source; the others count as weights of another kind."""
    unit_at = {(unit.block, unit.path): unit for unit in source.units}
    units = tuple(unit_at[place] for place in places)
    source.architecture = replace(source.architecture, units=units)
    source.stored = StoredTensors.of(source.model, source.architecture, source.stored.tensors)
    return source


@pytest.fixture
def source() -> Any:
    return with_units(LoadedModel(build_tiny_model("qwen2_moe")), PLACES)


@pytest.fixture(scope="module")
def windows(text_file, tokenizer) -> Windows:
    return draw_windows([str(text_file)], tokenizer, samples=12, seqlen=32)


def pruned(source: Any, windows: Windows, directory: Path, **changes: Any) -> PruningResult:
    compute = Compute("cpu", "float32", batch_windows=4)
    settings = PruneSettings(**{"budget": BUDGET, "compute": compute} | changes)
    work_dir = WorkDir(directory, identity={"command": "test"})
    return decide(job_of(source, settings, lambda: windows, work_dir=work_dir))[0]


def test_units_of_a_block_are_repaired_by_themselves(source, windows, tmp_path):
    """What is cut and solved for each architecture_contract.py checks."""
    result = pruned(source, windows, tmp_path, repair="ridge")
    plan, size = result.plan, model_size(source)
    assert [(unit.block, unit.path) for unit in plan.units] == PLACES
    assert [unit.ffns for unit in plan.units] == [4, 1, 1]
    assert plan.units[0].importance == plan.units[1].importance
    removed = source.parameter_count - size.parameters_with(plan.kept_widths)
    ffn = size.cost_of(size.width_U) * size.parameters_per_cost
    dearest = 8 * 4 * size.parameters_per_cost
    assert abs(removed - 0.4 * ffn) <= dearest
    assert plan.ffn_sparsity == pytest.approx(removed / ffn)
    specs = PrunedSource(source, plan).specs
    assert sum(spec.elements for spec in specs.values()) == source.parameter_count - removed
    block_1 = [name for name in specs if name.startswith("model.layers.1.")]
    assert all(specs[name] == source.parameters[name] for name in block_1)

    (step,) = result.steps
    assert [(entry["block"], entry["path"]) for entry in step["blocks"]] == PLACES
    assert all(entry["error_after"] <= entry["error_before"] for entry in step["blocks"])
    assert any(entry["kept"] for entry in step["blocks"])
    rejected = [{**entry, "kept": False} for entry in step["blocks"][1:]]
    said = steps_in_words([{"name": "ridge", "blocks": [step["blocks"][0], *rejected]}])
    assert f"0 {SHARED}, 2 {SHARED})" in said
    # All blocks are done: what they gave is read by a run that goes on.
    again = pruned(source, windows, tmp_path, repair="ridge")
    assert (again.plan, again.steps) == (plan, result.steps)
    assert set(again.tensors) == set(result.tensors)
    first, second = (each.statistics for each in (result, again))
    assert first is not None and second is not None
    assert [unit.routed_E for unit in first.units] == [unit.routed_E for unit in second.units]
    for name, tensor in again.tensors.items():
        assert isinstance(tensor, FileTensor) and tensor.spec == specs[name]


def test_plans_name_units_and_are_of_no_other_ones(source, windows, tmp_path, capsys):
    plan = pruned(source, windows, tmp_path, repair="none").plan
    plan.check_fits(source)
    assert PruningPlan.from_json(plan.to_json()) == plan
    print_plan(plan)
    printed = capsys.readouterr().out
    for name in (f"0 {EXPERTS} (4)", f"0 {SHARED}", f"2 {SHARED}"):
        assert f"\n{name} " in printed
    assert not plan.counts_channels  # their shares are of parameters
    others = (replace(plan.units[0], path="mlp.others"), *plan.units[1:])
    for units in (others, plan.units[1:]):
        with pytest.raises(PlanError, match="widths or experts are not those"):
            replace(plan, units=units).check_fits(source)


@pytest.mark.parametrize(("places", "fitted"), [(PLACES, [0, 2]), (PLACES[:1], [])], ids=str)
def test_sequential_repair_fits_the_dense_ffn_of_a_block(places, fitted, windows, tmp_path):
    source = with_units(LoadedModel(build_tiny_model("qwen2_moe")), places)
    ridge, *more = pruned(source, windows, tmp_path, repair="sequential").steps
    assert ridge["name"] == "ridge"
    # Where there is none, no window passes for nothing.
    assert [step["name"] for step in more] == ["sequential"] * bool(fitted)
    for step in more:
        assert [index for index, entry in enumerate(step["blocks"]) if entry] == fitted


@pytest.mark.parametrize("repair", ["ridge", "sequential"])
def test_what_no_block_can_make_up_for_is_said(repair, windows, tmp_path, caplog):
    blocks = Budget(0.34, parts=("blocks",))
    source = LoadedModel(build_tiny_model("mixtral"), blocks.parts)
    result = pruned(source, windows, tmp_path, repair=repair, budget=blocks)
    assert len(result.plan.removed_blocks) == 1 and not result.steps
    assert "is not made up for in 1 of the 1 blocks beside it" in caplog.text


def test_gram_matrices_of_all_ffns_of_a_block_count(source, windows, tmp_path, monkeypatch, caplog):
    expected = 4 * (4 * 96**2 + 40**2)
    assert gram_bytes(source.units) == {0: expected, 2: 4 * 40**2}
    for available, said in ((expected, False), (expected - 1, True)):
        monkeypatch.setattr("cfsp.repair.ridge_pass.available_bytes", lambda a=available: a)
        caplog.clear()
        pruned(source, windows, tmp_path / str(available), repair="ridge")
        assert ("the Gram matrices of block 0 take" in caplog.text) == said


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_block_without_an_ffn_passes_every_repair(windows, tmp_path, gap):
    blocks = [block for block in range(3) if block != gap]
    source = with_units(LoadedModel(build_tiny_model("llama")), [(b, "mlp") for b in blocks])
    result = pruned(source, windows, tmp_path, repair="sequential")
    assert [unit.block for unit in result.plan.units] == blocks
    ridge, sequential = result.steps
    for step in (ridge, sequential):
        assert [block for block, entry in enumerate(step["blocks"]) if entry is not None] == blocks
    assert not any(name.startswith(f"model.layers.{gap}.") for name in result.tensors)
