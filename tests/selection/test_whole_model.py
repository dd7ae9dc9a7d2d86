"""What requires the whole model in memory, through the flow: sensitivity, own text, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.own_files import PLAN_FILE, STATISTICS_FILE
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.cli import main
from cfsp.errors import StatisticsError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.allocation import allocate
from cfsp.planning.coarse import importance_by
from cfsp.planning.make import model_size
from cfsp.planning.plan_file import PruningPlan
from cfsp.selection import sensitivity
from cfsp.settings import SENSITIVITY, Budget, CalibrationText, Criterion, PruneSettings, Repair
from cfsp.streaming import runtime
from cfsp.streaming.runtime import Runtime
from checkpoint_tensors import changed
from tiny_models import WIDTH, build_tiny_model

MULTIPLE = 8


@pytest.fixture
def settings(text_file: Path) -> PruneSettings:
    text = CalibrationText((str(text_file),), samples=16, seqlen=24)
    return PruneSettings(Budget(0.5, multiple=MULTIPLE), text=text, repair="none")


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_widths_follow_the_measured_sensitivity(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    settings: PruneSettings,
    repair: Repair,
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    settings = replace(settings, criterion=Criterion(SENSITIVITY), repair=repair)
    report = prune_checkpoint(source, tmp_path / "out", settings)
    statistics = Statistics.load(tmp_path / "out" / STATISTICS_FILE)
    found = statistics.sensitivity
    assert found is not None
    assert (found.kept_L, found.windows) == ((0.5,) * 3, 8)
    assert min(found.divergence_L) > 0
    if repair == "none":  # with repair the distances come from fewer windows
        expected = allocate(
            importance_by(statistics, SENSITIVITY),
            settings.budget,
            model_size(source),
            "water-fill",
        )
        assert report.intermediate_sizes == expected
    assert abs(sum(report.intermediate_sizes) - 3 * WIDTH / 2) <= MULTIPLE
    assert report.plan.criterion["block_metric"] == SENSITIVITY
    assert report.plan.criterion["clamp"] == "water-fill"


def block_metric_of(out: Path) -> str:
    metric: str = PruningPlan.load(out / PLAN_FILE).criterion["block_metric"]
    return metric


def test_blocks_are_compared_by_sensitivity_where_repair_follows_and_memory_allows(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    settings: PruneSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    repaired = replace(settings, repair="ridge")
    prune_checkpoint(source, tmp_path / "plain", settings)
    assert block_metric_of(tmp_path / "plain") == "angular"
    prune_checkpoint(source, tmp_path / "repaired", repaired)
    assert block_metric_of(tmp_path / "repaired") == "sensitivity"
    decided = prune_checkpoint(source, tmp_path / "decided", repaired, dry_run=True)
    assert decided.plan.criterion["block_metric"] == "sensitivity"
    monkeypatch.setattr(runtime, "available_bytes", lambda: 1)
    prune_checkpoint(source, tmp_path / "small machine", repaired)
    assert block_metric_of(tmp_path / "small machine") == "angular"


def test_what_counts_is_the_memory_where_the_model_computes(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, gpu = Checkpoint(tiny_checkpoint("llama")), torch.device("cuda", 0)
    needed = runtime.needed_bytes(source, torch.bfloat16)
    for on_device, on_machine in ((needed, needed), (needed - 1, needed), (needed, needed - 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=on_device: (free, 0))
        monkeypatch.setattr(runtime, "available_bytes", lambda free=on_machine: free)
        expected = min(on_device, on_machine) == needed
        assert runtime.fits(source, Runtime(gpu, torch.bfloat16)) == expected
    # One in memory is there already.
    assert runtime.fits(LoadedModel(build_tiny_model("llama")), Runtime(gpu, torch.float32))


def test_a_killed_run_keeps_what_it_decided_when_memory_changes(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    settings: PruneSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    repaired = replace(settings, repair="ridge")

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cfsp.decide.choose_and_repair", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "out", repaired)
    monkeypatch.setattr(sensitivity, "with_sensitivity", killed)
    monkeypatch.setattr(runtime, "available_bytes", lambda: 1)
    prune_checkpoint(source, tmp_path / "out", repaired)
    assert block_metric_of(tmp_path / "out") == "sensitivity"


def test_saved_statistics_without_sensitivity_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, settings: PruneSettings
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    prune_checkpoint(source, tmp_path / "plain", settings)
    statistics = Statistics.load(tmp_path / "plain" / STATISTICS_FILE)
    settings = replace(settings, criterion=Criterion("sensitivity"))
    with pytest.raises(StatisticsError, match="cfsp calibrate --sensitivity"):
        prune_checkpoint(source, tmp_path / "out", settings, statistics=statistics)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: PruneSettings,
) -> None:
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    monkeypatch.setattr(
        "cfsp.selection.divergence.load", lambda *args, **kwargs: pytest.fail("it was read")
    )
    source = Checkpoint(tiny_checkpoint("llama"))
    with pytest.raises(UsageError, match=r"runs the whole model, .* GB are available"):
        prune_checkpoint(
            source, tmp_path / "out", replace(settings, criterion=Criterion("sensitivity"))
        )
    assert not (tmp_path / "out").exists()


def test_the_command_line_measures_once_and_plans_without_the_model(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, statistics = tiny_checkpoint("llama"), tmp_path / "stats.safetensors"

    def run(*argv: object, status: int = 0) -> str:
        assert main([str(arg) for arg in argv]) == status
        return capsys.readouterr().err

    text = ["--data", text_file, "--samples", 8, "--seqlen", 16]
    run("calibrate", model, *text, "--sensitivity", "--out", statistics)
    assert Statistics.load(statistics).sensitivity is not None
    budget = ["--sparsity", 0.5, "--multiple", MULTIPLE, "--block-metric", SENSITIVITY]
    out = tmp_path / "plan.json"
    run("plan", model, "--statistics", statistics, *budget, "--out", out)
    plan = PruningPlan.load(out)
    assert (plan.criterion["block_metric"], plan.criterion["clamp"]) == (budget[-1], "water-fill")


def test_a_config_may_ask_for_more_than_logits(
    tiny_checkpoint: Callable[[str], Path], tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    """Mixtures of experts that were fine-tuned often return router logits."""
    plain, asking = tiny_checkpoint("mixtral"), tmp_path / "asking"
    shutil.copytree(plain, asking)
    config = json.loads((plain / "config.json").read_text())
    asked = {"output_router_logits": True, "output_hidden_states": True}
    (asking / "config.json").write_text(json.dumps(config | asked))
    options: dict[str, Any] = {
        "goal": cfsp.TargetParameters(0.8), "parts": ["ffn", "blocks"], "data": [str(text_file)],
        "samples": 4, "seqlen": 16, "multiple": 8, "device": "cpu",
    }  # fmt: skip
    expected, of_path, of_memory = (tmp_path / name for name in ("plain", "path", "memory"))
    cfsp.prune(plain, out=expected, **options)
    cfsp.prune(asking, out=of_path, **options)
    cfsp.prune(cfsp.load(asking), tokenizer, **options).save_pretrained(of_memory)
    for out in (of_path, of_memory):
        assert changed(expected, out) == set()
        assert json.loads((out / "config.json").read_text())["output_router_logits"]
    assert not json.loads((expected / "config.json").read_text()).get("output_router_logits")
