"""Sequential repair: each down projection takes over what it can of the drift, never more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import job_of
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.cut.surgery import PrunedSource
from cfsp.decide import decide
from cfsp.job import Job
from cfsp.repair.result import PruningResult
from cfsp.repair.sequential import SequentialRepair, repair_sequentially
from cfsp.settings import Budget, Compute, PruneSettings
from cfsp.streaming import pass_state
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from drawn_windows import draw_windows
from tiny_models import BLOCKS, build_tiny_model

HALF = Budget(0.5, multiple=4)


@pytest.fixture(scope="module")
def windows(text_file: Path, tokenizer: Any) -> Windows:
    return draw_windows([str(text_file)], tokenizer, samples=65, seqlen=32, seed=0)


@pytest.fixture(scope="module")
def job(windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> Job:
    source = LoadedModel(build_tiny_model("llama"))
    return job_for(source, windows, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def ridge(job: Job) -> PruningResult:
    return decide(job)[0]


@pytest.fixture(scope="module")
def fitted(job: Job, ridge: PruningResult, windows: Windows) -> PruningResult:
    return repair_sequentially(job, ridge, windows)


def job_for(
    source: LoadedModel,
    windows: Windows,
    directory: Path,
    budget: Budget = HALF,
) -> Job:
    compute = Compute("cpu", "float32", batch_windows=4)
    place = WorkDir(directory, identity={"command": "test"})
    return job_of(source, PruneSettings(budget, compute=compute), lambda: windows, place=place)


def model_of(job: Job, result: PruningResult) -> Any:
    source: Any = job.source
    return build_pruned_model(source.model, source, result.plan, result.tensors)


def pruned_source(job: Job, result: PruningResult) -> PrunedSource:
    return PrunedSource(job.source, result.plan, result.tensors)


def last_step(result: PruningResult) -> list[dict[str, Any]]:
    """Return what the last step did with each block."""
    blocks: list[dict[str, Any]] = result.to_json()["steps"][-1]["blocks"]
    return blocks


def seen(model: Any, block: int, tokens: torch.Tensor) -> tuple[Any, Any]:
    """What leaves a block (rows x D), and what enters its down projection (rows x K)."""
    module, rows = model.model.layers[block], {}

    def note(name: str, hidden: torch.Tensor) -> None:
        rows[name] = hidden.flatten(0, 1).double().numpy()

    module.register_forward_hook(lambda m, args, output: note("left", output))
    module.mlp.down_proj.register_forward_pre_hook(lambda m, args: note("channels", args[0]))
    with torch.no_grad():
        model(tokens)
    return rows["left"], rows["channels"]


def test_weights_are_the_ridge_solution_for_the_drift(
    job: Job, ridge: PruningResult, fitted: PruningResult, windows: Windows
) -> None:
    entries = last_step(fitted)
    block = max(i for i, entry in enumerate(entries) if entry["kept"])
    assert block > 0  # it is entered by what blocks give after their repair
    tokens = windows.tokens_NT[~windows.held_out_N]
    dense = build_tiny_model("llama")  # another one: hooks stay
    before, after = model_of(job, ridge), model_of(job, fitted)
    target, _ = seen(dense, block, tokens)
    # That block with the ridge's weights, on the stream of the repaired blocks before it.
    for own, repaired in zip(before.model.layers[:block], after.model.layers, strict=False):
        own.load_state_dict(repaired.state_dict())
    left, x = seen(before, block, tokens)
    d = target - left
    gram = x.T @ x / len(x)
    gram += entries[block]["strength"] * np.diag(gram).mean() * np.eye(len(gram))
    change = np.linalg.solve(gram, x.T @ d / len(x)).T
    name = f"model.layers.{block}.mlp.down_proj.weight"
    expected = pruned_source(job, ridge).read(name).double().numpy() + change
    found = pruned_source(job, fitted).read(name).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_only_down_projections_change_and_the_model_comes_closer(
    job: Job, ridge: PruningResult, fitted: PruningResult
) -> None:
    new, old = pruned_source(job, fitted), pruned_source(job, ridge)
    assert new.specs == old.specs
    changed = {name for name in old.specs if not torch.equal(new.read(name), old.read(name))}
    assert changed
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert [step.name for step in fitted.steps] == ["ridge", "sequential"]
    for entry in last_step(fitted):
        assert entry["training_steps"] == 0
        assert (entry["strength"] is not None) == entry["kept"]
        if entry["kept"]:
            assert entry["loss_after"] < entry["loss_before"]
    tokens = torch.arange(64)[None] * 7 % 320
    models = build_tiny_model("llama"), model_of(job, fitted), model_of(job, ridge)
    dense, one, other = (model(tokens).logits.detach() for model in models)
    assert (one - dense).square().mean() < (other - dense).square().mean()


@pytest.mark.parametrize("budget", [None, 1000], ids=["memory", "file"])
def test_interrupted_it_goes_on_and_gives_the_same_bits(
    job: Job,
    ridge: PruningResult,
    fitted: PruningResult,
    windows: Windows,
    budget: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="cfsp")
    place = replace(job.place, directory=tmp_path)
    if budget is not None:
        place = replace(place, memory_budget=budget)
    work = SequentialRepair.work

    def interrupted(self: SequentialRepair, group: Any) -> Any:
        if group.last == 2:
            raise KeyboardInterrupt
        return work(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(pass_state, "SHARE_OF_TIME", float("inf"))
        patch.setattr(SequentialRepair, "work", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repair_sequentially(job.at(place), ridge, windows)
    again = repair_sequentially(job.at(place), ridge, windows)
    assert f"sequential: going on at block 2 of {BLOCKS}" in caplog.text
    new, old = pruned_source(job, again), pruned_source(job, fitted)
    assert all(torch.equal(new.read(name), old.read(name)) for name in old.specs)


def test_with_all_channels_no_bit_changes(windows: Windows, tmp_path: Path) -> None:
    source = LoadedModel(build_tiny_model("llama"))
    job = job_for(source, windows, tmp_path, Budget(0.0, multiple=4))
    new = pruned_source(job, repair_sequentially(job, decide(job)[0], windows))
    assert all(torch.equal(new.read(name), source.read(name)) for name in source.specs)


# Every other one is fitted before it is trained, in test_local.py.
@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_fitted_is_no_worse_than_ridge(
    name: str, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    dense = build_tiny_model(name)
    windows = draw_windows([str(text_file)], tokenizer, samples=64, seqlen=32)
    job = job_for(LoadedModel(dense), windows, tmp_path)
    ridge = decide(job)[0]
    fitted = repair_sequentially(job, ridge, windows)
    tokens = draw_windows([str(text_file)], tokenizer, samples=8, seqlen=32, seed=7).tokens_NT
    models = dense, model_of(job, ridge), model_of(job, fitted)
    with torch.inference_mode():
        target, plain, better = (model(tokens).logits for model in models)
    # In Gemma a norm follows the FFN, so least squares predict it less well.
    error, before = (better - target).square().mean(), (plain - target).square().mean()
    assert error < before * (1.05 if name == "gemma3_text" else 1.001)
