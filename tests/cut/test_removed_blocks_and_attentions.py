"""Blocks and attentions go together, by one joint choice: what is masked is what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from builders import goal_of_share, plan_without
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.stored_blocks import parameters_of_attentions, parameters_of_blocks
from cfsp.cli import main
from cfsp.cut.in_memory import build_pruned_model
from cfsp.engine.block_proof import check_attentions_can_go
from cfsp.errors import BudgetError, StatisticsError, UnsupportedModelError, UsageError
from cfsp.pipeline import plan_from, prune_checkpoint
from cfsp.planning.candidate import Candidate, Dropped, DropSizes
from cfsp.planning.make import Planner
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.prune_report import PruneReport
from cfsp.selection import drop_order
from cfsp.settings import (
    PARTS,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    LocalTraining,
    Part,
    PruneSettings,
    Repair,
)
from family_contract import question_of, save_with_tokenizer
from forks import Forks
from pruned_checks import (
    SETTINGS,
    Case,
    check_a_fresh_process_keeps_the_contract,
    check_caches_agree_with_none,
    check_in_memory_is_the_checkpoint,
    check_its_plan_gives_the_same,
    generated,
    logits_of,
    nothing_from,
)
from tiny_decoders import tiny_model

BOTH: tuple[Part, ...] = ("attention", "blocks")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Two kinds of cache, and queries, keys and values in one matrix.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 7,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING],
    },
    "gpt2": {"n_layer": 5},
}


def by_plan(
    dense: Path, plan: PruningPlan, out: Path, text: Path, repair: Repair = "none"
) -> PruneReport:
    """Prune by a plan, and repair on a little text."""
    settings = PruneSettings(
        Budget(),
        text=CalibrationText((str(text),), samples=6, seqlen=32),
        compute=Compute("cpu"),
        repair=repair,
        local=LocalTraining(steps=1),
    )
    return prune_checkpoint(Checkpoint(dense, parts=plan.parts), out, settings, plan=plan)


@pytest.fixture(scope="module", params=CONFIGS)
def case(
    request: pytest.FixtureRequest,
    tokenizer: Any,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    place = tmp_path_factory.mktemp(request.param)
    dense = tiny_model(request.param, **CONFIGS[request.param])
    source, out = place / "dense", place / "out"
    save_with_tokenizer(dense, tokenizer, source)
    plan = plan_without(Checkpoint(source, parts=BOTH), Dropped((2,), (0, 3)))
    report = by_plan(source, plan, out, text_file)
    return Case(dense, source, out, report, question_of(dense, source).tokens_BT, {})


def test_what_is_masked_is_cut(case: Case) -> None:
    plan = case.report.plan
    assert (len(plan.removed_blocks), len(plan.removed_attentions)) == (1, 2)
    with nothing_from(case.dense, plan):
        expected = logits_of(case.dense, case.tokens_BT)
    actual = logits_of(cfsp.load(case.out), case.tokens_BT)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    source = Checkpoint(case.source, parts=BOTH)
    gone = sum(parameters_of_blocks(source)[block] for block in plan.removed_blocks)
    gone += sum(parameters_of_attentions(source)[block] for block in plan.removed_attentions)
    assert case.report.parameters_before - case.report.parameters_after == gone


def test_caches_agree_with_none(case: Case) -> None:
    check_caches_agree_with_none(case)


def test_a_fresh_process_keeps_the_contract(case: Case, forks: Forks, tmp_path: Path) -> None:
    check_a_fresh_process_keeps_the_contract(case, forks, tmp_path)


def test_in_memory_is_the_checkpoint(case: Case, tmp_path: Path) -> None:
    source = LoadedModel(case.dense, BOTH)
    pruned = build_pruned_model(case.dense, source, case.report.plan, {})
    check_in_memory_is_the_checkpoint(case, pruned, tmp_path)


def test_commands_tell_of_both(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = case.report.plan
    check_its_plan_gives_the_same(case, tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(case.out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kv_groups"] == case.report.kv_groups["after"]
    assert told["kv_groups"].count(0) == 2
    assert told["pruned"]["removed_attentions"] == list(plan.removed_attentions)
    assert told["pruned"]["removed_blocks"] == list(plan.removed_blocks)
    assert main(["inspect", str(case.out)]) == 0
    assert plan.removed_in_words in capsys.readouterr().out
    assert plan.removed_in_words in (case.out / "README.md").read_text()
    assert main(["verify", str(case.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]


def test_blocks_make_up_for_both(case: Case, text_file: Path, tmp_path: Path) -> None:
    report = by_plan(case.source, case.report.plan, tmp_path / "out", text_file, "ridge")
    assert report.plan == case.report.plan
    (step,) = report.repair["steps"]
    assert step["name"] == "gaps"
    (gone,) = report.plan.removed_blocks
    beside = gone - 1 if gone else 1
    fitted = [block for block, entry in enumerate(step["blocks"]) if entry is not None]
    assert fitted == sorted({beside, *report.plan.removed_attentions})
    before, after = (cfsp.load(place).state_dict() for place in (case.out, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == sum(step["blocks"][block]["kept"] for block in fitted) > 0


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama") / "dense"
    save_with_tokenizer(tiny_model("llama", num_hidden_layers=5), tokenizer, place)
    return place


def test_plans_follow_the_order_in_statistics(llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = Checkpoint(llama, parts=BOTH)
    saved = tmp_path / "stats.safetensors"
    asked = ["--parts", "attention,blocks", "--data", str(text_file), "--device", "cpu"]
    asked += ["--samples", "6", "--seqlen", "32", "--out", str(saved)]
    assert main(["calibrate", str(llama), *asked]) == 0
    statistics = Statistics.load(saved)
    order = statistics.removals_of(BOTH)
    assert order and not statistics.removals_of(("blocks",))
    sizes = DropSizes.of(source, BOTH)

    def planned(share: float, parts: tuple[Part, ...] = BOTH, removal: str = "auto") -> PruningPlan:
        goal = goal_of_share(llama, parts, share)
        settings = PruneSettings(Budget(parts=parts), Criterion(removal=removal), goal=goal)
        return plan_from(source, statistics, settings)[0]

    for share in (0.05, 0.3, 0.51):
        plan = planned(share)
        dropped = Dropped(plan.removed_blocks, plan.removed_attentions)
        assert abs(sizes.parameters(dropped) - share * sizes.total) <= sizes.largest / 2
    # What was measured up to half of the blocks is the plan for half of them.
    assert dropped == Dropped.of(order)
    assert plan.criterion["of"] == "blocks"
    with pytest.raises(StatisticsError, match="cfsp calibrate --parts attention"):
        cfsp.plan(llama, statistics, sparsity=0.3, parts="attention", removal="divergence")
    with pytest.raises(UsageError, match="prune blocks, then attention layers of the result"):
        planned(0.3, removal="runs")
    with pytest.raises(UsageError, match="should go, which requires the model and a text"):
        planned(0.3, ("ffn", "attention", "blocks"))


def test_how_many_go_beside_channels_is_tried(llama: Path, text_file: Path, tmp_path: Path) -> None:
    parts: tuple[Part, ...] = ("ffn", "attention", "blocks")
    report = cfsp.prune(
        llama, out=tmp_path / "out", parts=parts, goal=goal_of_share(llama, parts, 0.4),
        repair="none", multiple=1, data=[str(text_file)], **SETTINGS,
    )  # fmt: skip
    total = sum(parameters_of_blocks(Checkpoint(llama)))
    gone = report.parameters_before - report.parameters_after
    assert gone == pytest.approx(0.4 * total, rel=0.02)
    assert report.plan.has_gaps


@pytest.mark.parametrize(("parts", "repair"), [(("ffn",), "ridge"), (("ffn", "kv"), "local")])
def test_channels_of_the_others_are_repaired(
    llama: Path, text_file: Path, tmp_path: Path, parts: tuple[Part, ...], repair: Repair
) -> None:
    every = tuple(part for part in PARTS if part in (*parts, *BOTH))
    source = Checkpoint(llama, parts=every)
    statistics = cfsp.calibrate(llama, parts=every, data=[str(text_file)], **SETTINGS)
    planner = Planner.of(source, statistics, Budget(parts=every, multiple=1), Criterion())
    plan = planner.plan(Candidate(Dropped((1,), (3,)), 0, parts, 0.3))
    report = by_plan(llama, plan, tmp_path / "out", text_file, repair)
    ridge, *later = report.repair["steps"]
    assert ridge["name"] == "ridge"
    expected = ["gaps"] if repair == "ridge" else ["sequential", "local"]
    assert [step["name"] for step in later] == expected
    # What goes whole is not among what was repaired.
    assert [entry is None for entry in ridge["blocks"]] == [not unit.kept for unit in plan.units]
    model, tokens_BT = cfsp.load(tmp_path / "out"), torch.arange(2, 26).view(2, 12)
    assert torch.equal(generated(model, tokens_BT), generated(model, tokens_BT, use_cache=False))


def test_a_killed_run_goes_on_with_what_it_had_chosen(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"parts": BOTH, "goal": goal_of_share(llama, BOTH, 0.3)}
    asked |= {"data": [str(text_file)], **SETTINGS}

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cfsp.decide.select", killed)
        with pytest.raises(KeyboardInterrupt):
            cfsp.prune(llama, out=tmp_path / "out", **asked)
    expected = cfsp.prune(llama, out=tmp_path / "at-once", **asked)
    monkeypatch.setattr(drop_order, "measure_order", killed)
    assert cfsp.prune(llama, out=tmp_path / "out", **asked).plan == expected.plan


def test_impossible_mixes_are_refused(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--remove-blocks belongs to --parts blocks alone"):
        Budget(parts=BOTH, remove_blocks=2)
    asked = {"parts": BOTH, "data": [str(text_file)], **SETTINGS}
    with pytest.raises(BudgetError, match=r"at least one of 5 blocks must stay; between 0 and"):
        cfsp.prune(llama, out=tmp_path / "o", goal=cfsp.TargetParameters(0.25), **asked)
    monkeypatch.setattr(drop_order, "fits", lambda *args: False)
    with pytest.raises(UsageError, match="requires the whole model in memory"):
        cfsp.prune(llama, out=tmp_path / "o", goal=cfsp.TargetParameters(0.8), **asked)
    source = LoadedModel(tiny_model("gemma3_text", **CONFIGS["gemma3_text"]), BOTH)
    with pytest.raises(UnsupportedModelError, match=r"of block 1 .* beside blocks 3, 5: at least"):
        check_attentions_can_go(source, [1], [3, 5])
    check_attentions_can_go(source, [1], [0, 5])
