"""Sequential repair: each down projection takes over what it can of the drift, never more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cfsp
from builders import changed, draw_windows, entries, job_of
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.cut.surgery import PrunedSource, build_pruned_model
from cfsp.decide import Known, decide
from cfsp.job import Job
from cfsp.pipeline import prune_checkpoint
from cfsp.repair import sequential
from cfsp.repair.result import PruningResult
from cfsp.repair.sequential import NAME, blocks_at_gaps, repair_drift
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings
from cfsp.streaming import block_pass
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, build_tiny_model, dense_configs

HALF = Budget(0.5, multiple=4)


@pytest.fixture(scope="module")
def windows(text_file, tokenizer) -> Windows:
    return draw_windows([str(text_file)], tokenizer, samples=65, seqlen=32, seed=0)


@pytest.fixture(scope="module")
def job(windows, tmp_path_factory) -> Job:
    source = LoadedModel(build_tiny_model("llama"))
    return job_for(source, windows, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def ridge(job) -> PruningResult:
    return decide(job)[0]


@pytest.fixture(scope="module")
def fitted(job, ridge, windows) -> PruningResult:
    return repair_drift(NAME, job, ridge, windows)


def job_for(source: LoadedModel, windows: Windows, directory: Path, budget: Budget = HALF) -> Job:
    compute = Compute("cpu", "float32", batch_windows=4)
    own = WorkDir(directory, identity={"command": "test"})
    settings = PruneSettings(budget, compute=compute)
    return job_of(source, settings, lambda: windows, work_dir=own)


def model_of(job: Job, result: PruningResult) -> Any:
    source: Any = job.source
    return build_pruned_model(source, result.plan, result.tensors)


def pruned_source(job: Job, result: PruningResult) -> PrunedSource:
    return PrunedSource(job.source, result.plan, result.tensors)


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


def test_weights_are_the_ridge_solution_for_the_drift(job, ridge, fitted, windows):
    blocks = fitted.steps[-1]["blocks"]
    block = max(i for i, entry in enumerate(blocks) if entry["kept"])
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
    gram += blocks[block]["strength"] * np.diag(gram).mean() * np.eye(len(gram))
    change = np.linalg.solve(gram, x.T @ d / len(x)).T
    name = f"model.layers.{block}.mlp.down_proj.weight"
    # No block is removed here, so it takes over half of the drift.
    expected = pruned_source(job, ridge).read(name).double().numpy() + change / 2
    found = pruned_source(job, fitted).read(name).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_only_down_projections_change_and_the_model_comes_closer(job, ridge, fitted):
    new, old = pruned_source(job, fitted), pruned_source(job, ridge)
    assert new.specs == old.specs
    fitted_to = {name for name in old.specs if not torch.equal(new.read(name), old.read(name))}
    assert fitted_to
    assert all(name.endswith("down_proj.weight") for name in fitted_to)
    assert [step["name"] for step in fitted.steps] == ["ridge", "sequential"]
    for entry in fitted.steps[-1]["blocks"]:
        assert (entry["strength"] is not None) == entry["kept"]
        if entry["kept"]:
            assert entry["loss_after"] < entry["loss_before"]
    tokens = torch.arange(64)[None] * 7 % 320
    models = build_tiny_model("llama"), model_of(job, fitted), model_of(job, ridge)
    dense, one, other = (model(tokens).logits.detach() for model in models)
    assert (one - dense).square().mean() < (other - dense).square().mean()


def test_with_all_channels_no_bit_changes(windows, tmp_path):
    source = LoadedModel(build_tiny_model("llama"))
    job = job_for(source, windows, tmp_path, Budget(0.0, multiple=4))
    new = pruned_source(job, repair_drift(NAME, job, decide(job)[0], windows))
    assert all(torch.equal(new.read(name), source.read(name)) for name in source.specs)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3n_text", "only a pass through the dense blocks can follow"),
        ("hy_v4", "keep several hidden states of a token"),
    ],
)
def test_blocks_that_need_more_than_hidden_states_stay_as_the_ridge_left_them(
    windows, tmp_path, caplog, name, why
):
    source = LoadedModel(tiny_model(name))
    job = job_for(source, windows, tmp_path, Budget(0.5, multiple=8))
    result = decide(replace(job, settings=replace(job.settings, repair="sequential")))[0]
    assert [step["name"] for step in result.steps] == ["ridge"]
    assert "no sequential repair of this model, the ridge stays: " in caplog.text
    assert why in caplog.text


def test_a_gap_beside_blocks_that_need_more_than_hidden_states_stays(save, few, tmp_path, caplog):
    model, out = save(tiny_model("gemma4_text")), tmp_path / "out"
    report = cfsp.prune(model, out=out, parts="attention", remove=1, **few)
    assert report.repair["steps"] == []
    assert "what was removed is not made up for: argument 0 of block 0 differs" in caplog.text


# Norms after the FFN and capped logits, transposed matrices, projections around the blocks, and
# attention and FFN side by side. Of Llama's kind are all other tests.
KINDS = dense_configs("gemma2", "gpt2", "opt-projected", "stablelm-parallel")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_dense_model_comes_closer(name, windows, tmp_path):
    job = job_for(LoadedModel(build_tiny_model(name)), windows, tmp_path)
    ridge, _ = decide(job)
    fitted = repair_drift(NAME, job, ridge, windows)
    assert any(entry["kept"] for entry in fitted.steps[-1]["blocks"])
    tokens = windows.tokens_NT[windows.held_out_N]
    with torch.inference_mode():
        target, before, after = (
            model(tokens).logits
            for model in (build_tiny_model(name), model_of(job, ridge), model_of(job, fitted))
        )
    assert (after - target).square().mean() < (before - target).square().mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_of_16_bits_are_fitted(dtype, model, text_file, tmp_path):
    asked = {"data": [text_file], "samples": 17, "seqlen": 32, "device": "cpu", "dtype": dtype}
    asked |= {"sparsity": 0.5, "multiple": 4, "repair": "sequential"}
    _ridge, fitted = cfsp.prune(model, out=tmp_path / "out", **asked).repair["steps"]
    assert all(block["loss_after"] <= block["loss_before"] for block in fitted["blocks"])
    assert any(block["kept"] for block in fitted["blocks"])


def test_interrupted_it_gives_the_same_bits(
    model, text_file, tmp_path, monkeypatch, noted, command
):
    text = ["--data", text_file, "--samples", 33, "--seqlen", 32, "--multiple", 4]
    asked = ["prune", model, *text, "--sparsity", 0.5, "--repair", "sequential"]
    command(*asked, "--out", tmp_path / "once")
    asked += ["--memory-budget", "1KB", "--out", tmp_path / "out"]
    noted(sequential, "_best", lambda *_: None, dies_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(block_pass, "SHARE_OF_TIME", float("inf"))
        command(*asked, status=130)
    assert entries(tmp_path) == {"once", "out.work"}
    assert f"sequential: going on at block 1 of {BLOCKS}" in command(*asked).err
    assert not changed(tmp_path / "once", tmp_path / "out")


# Blocks beside removed ones.


def test_blocks_at_gaps():
    assert blocks_at_gaps(6, ()) == []
    assert blocks_at_gaps(6, (2, 3)) == [1]
    assert blocks_at_gaps(6, (1, 4, 5)) == [0, 2]
    # Where the first blocks go, the first that stays.
    assert blocks_at_gaps(6, (0, 1)) == [0]
    assert blocks_at_gaps(6, (0, 2)) == [0]


@pytest.fixture(scope="module")
def asked(text_file) -> dict[str, Any]:
    return {
        "parts": "blocks", "sparsity": 0.34, "data": [text_file], "samples": 12, "seqlen": 64,
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def gaps(model, asked, tmp_path_factory) -> cfsp.PruneReport:
    """A model without a block, which the block before it makes up for."""
    return cfsp.prune(model, out=tmp_path_factory.mktemp("gaps") / "out", **asked)


def test_what_was_removed_is_made_up_for_in_whole(model, asked, gaps, tmp_path, monkeypatch):
    monkeypatch.setattr(sequential, "SHARE_OF_DRIFT", 0.0)
    cfsp.prune(model, out=tmp_path / "none", **asked)
    assert not changed(Path(gaps.out), tmp_path / "none")


def test_sequential_repair_handles_gaps_itself(model, asked, gaps, tmp_path):
    report = cfsp.prune(model, out=tmp_path / "out", repair="sequential", **asked)
    (step,) = report.repair["steps"]
    assert step["name"] == "sequential"
    (removed,) = report.plan.removed_blocks
    assert [entry is None for entry in step["blocks"]] == [i == removed for i in range(3)]
    if removed:  # before the gap both streams are the same, so there is nothing to fit
        assert step["blocks"][removed - 1] == gaps.repair["steps"][0]["blocks"][removed - 1]
    assert Checkpoint(tmp_path / "out").architecture.block_count == 2


def test_a_plan_with_blocks_is_repaired_as_in_one_run(model, asked, gaps, tmp_path):
    text = CalibrationText((str(asked["data"][0]),), samples=12, seqlen=64)
    settings = PruneSettings(Budget(0.0), text=text, compute=Compute("cpu"))
    known = Known(plan=gaps.plan)
    prune_checkpoint(Checkpoint(model), tmp_path / "obeyed", settings, known=known)
    assert not changed(Path(gaps.out), tmp_path / "obeyed")
