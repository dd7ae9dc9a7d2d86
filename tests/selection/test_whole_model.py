"""What requires the whole model in memory, through the flow: sensitivity, own text, refusals."""

import shutil
from dataclasses import replace

import pytest
import torch

import cfsp
from builders import changed, edit_json, never, read_json, stopped_at
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.own_files import STATISTICS_FILE
from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import StatisticsError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.allocation import allocate
from cfsp.planning.importance import importance_by
from cfsp.planning.make import model_size
from cfsp.selection import divergence
from cfsp.settings import Budget, CalibrationText, Compute, Criterion, PruneSettings, Repair
from cfsp.streaming import runtime
from cfsp.streaming.runtime import Runtime
from tiny_models import build_tiny_model

MULTIPLE = 8


@pytest.fixture
def settings(text_file) -> PruneSettings:
    text = CalibrationText((str(text_file),), samples=16, seqlen=24)
    return PruneSettings(Budget(0.5, multiple=MULTIPLE), text=text, repair="none")


def test_widths_follow_the_measured_sensitivity(source, tmp_path, settings):
    settings = replace(settings, criterion=Criterion("sensitivity"))
    report = prune_checkpoint(source, tmp_path / "out", settings)
    statistics = cfsp.Statistics.load(tmp_path / "out" / STATISTICS_FILE)
    found = statistics.sensitivity
    assert found is not None
    assert (found.kept_L, found.windows) == ((0.5,) * 3, 8)
    assert min(found.divergence_L) > 0
    importance_L = importance_by(statistics, "sensitivity")
    expected = allocate(
        importance_L, settings.budget, model_size(source, settings.budget), "water-fill"
    )
    assert report.intermediate_sizes == expected
    criterion = report.plan.criterion
    assert (criterion["block_metric"], criterion["clamp"]) == ("sensitivity", "water-fill")


def test_sensitivity_is_where_repair_follows_and_memory_allows(
    source, tmp_path, settings, monkeypatch
):
    def metric_of(repair: Repair, name: str = "out") -> str:
        asked = replace(settings, repair=repair)
        plan = prune_checkpoint(source, tmp_path / name / repair, asked, dry_run=True).plan
        return str(plan.criterion["block_metric"])

    assert metric_of("none") == "angular"
    assert metric_of("ridge") == "sensitivity"
    monkeypatch.setattr(runtime, "available_bytes", lambda: 1)
    assert metric_of("ridge", "small machine") == "angular"


def test_an_accelerator_without_float64_is_not_taken(source, monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: mps)
    assert runtime.runtime_of(Compute("auto"), source).device.type == "cpu"
    assert compute_device("auto", float64=False) == mps
    with pytest.raises(UsageError, match=r"float64, .* found mps, .* give --device cpu"):
        runtime.runtime_of(Compute("mps"), source)


def test_what_counts_is_the_memory_where_the_model_computes(source, monkeypatch):
    gpu = torch.device("cuda", 0)
    needed = runtime.needed_bytes(source, torch.bfloat16)
    for on_device, on_machine in ((needed, needed), (needed - 1, needed), (needed, needed - 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=on_device: (free, 0))
        monkeypatch.setattr(runtime, "available_bytes", lambda free=on_machine: free)
        expected = min(on_device, on_machine) == needed
        assert runtime.fits(source, Runtime(gpu, torch.bfloat16)) == expected
    # One in memory is there already, if it does not wait on the CPU.
    waiting = LoadedModel(build_tiny_model("llama"))
    assert runtime.fits(waiting, Runtime(torch.device("cpu"), torch.float32))
    assert not runtime.fits(waiting, Runtime(gpu, torch.float32))


def test_a_killed_run_keeps_what_it_decided_when_memory_changes(
    source, tmp_path, settings, monkeypatch
):
    repaired, out = replace(settings, repair="ridge"), tmp_path / "out"
    stopped_at("cfsp.decide.choose_and_repair", prune_checkpoint, source, out, repaired)
    monkeypatch.setattr(divergence, "measure_sensitivity", never)
    monkeypatch.setattr(runtime, "available_bytes", lambda: 1)
    plan = prune_checkpoint(source, out, repaired).plan
    assert plan.criterion["block_metric"] == "sensitivity"


def test_what_sensitivity_cannot_be_measured_on_is_refused(model, few, monkeypatch):
    plain = cfsp.calibrate(model, block_metric="angular", **few)
    with pytest.raises(StatisticsError, match="cfsp calibrate --set block_metric=sensitivity"):
        cfsp.plan(model, plain, sparsity=0.5, block_metric="sensitivity")
    measured = cfsp.calibrate(model, **few)
    plan = cfsp.plan(model, measured, sparsity=0.5, block_metric="sensitivity")
    assert plan.criterion["block_metric"] == "sensitivity"
    # A model that does not fit is not even read.
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    monkeypatch.setattr("cfsp.selection.divergence.load", never)
    with pytest.raises(UsageError, match=r"runs the whole model, .* GB are available"):
        cfsp.calibrate(model, block_metric="sensitivity", **few)


def test_statistics_have_the_sensitivity_of_all_that_can_be_planned(model, few):
    statistics = cfsp.calibrate(model, parts="kv", **few)
    assert cfsp.plan(model, statistics, parts="kv", sparsity=0.5).sparsity_of("kv") > 0
    assert cfsp.plan(model, statistics, sparsity=0.5).sparsity_of("ffn") > 0


def test_a_config_may_ask_for_more_than_logits(tiny_checkpoint, tokenizer, few, tmp_path):
    """Mixtures of experts that were fine-tuned often return router logits."""
    plain, asking = tiny_checkpoint("mixtral"), tmp_path / "asking"
    shutil.copytree(plain, asking)
    asked = {"output_router_logits": True, "output_hidden_states": True}
    edit_json(asking / "config.json", lambda fields: fields.update(asked))
    options = {"parts": "ffn,blocks", "target_params": 0.8, "multiple": 8, "effort": "fast", **few}
    expected, found = tmp_path / "plain", tmp_path / "asking's"
    cfsp.prune(plain, out=expected, **options)
    cfsp.prune(cfsp.load(asking), tokenizer, **options).save_pretrained(found)
    assert changed(expected, found) == set()
    assert read_json(found / "config.json")["output_router_logits"]
