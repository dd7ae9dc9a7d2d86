"""Local repair: blocks trained alone come closer to the dense model, and never go away."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cfsp
from builders import (
    changed,
    draw_windows,
    entries,
    numpy_divergence,
    plan_keeping,
    random_tokens,
    tensors,
)
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton
from cfsp.cli import main
from cfsp.cut.surgery import PrunedSource, build_pruned_model
from cfsp.pipeline import prune_model
from cfsp.planning.candidate import Dropped
from cfsp.processes import Team
from cfsp.repair import ladder
from cfsp.repair import local as local_repair
from cfsp.repair.local import HeadLoss, group_of, highest_rate, schedule, train_blocks
from cfsp.repair.two_streams import Batch, BlockGroup, Split, hidden_loss, token_error
from cfsp.result.manifest import read_manifest
from cfsp.settings import Budget, CalibrationText, LocalTraining, PruneSettings
from cfsp.streaming import work_dir
from cfsp.streaming.block_calls import record_calls
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.stand_in import hidden_states_entering
from cfsp.text.windows import Windows
from tiny_models import BLOCKS, DENSE_CONFIGS, TRAINED, WIDTH, build_tiny_model

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def test_losses_are_relative_to_each_token_and_to_all_together():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 500, 8, generator=generator)
    target[:, 0] *= 1000  # as the first tokens of a window often are
    output = target + 0.1 * torch.randn(2, 500, 8, generator=generator)
    t, o = target.double().numpy(), output.double().numpy()
    each = np.mean(np.linalg.norm(o - t, axis=-1) / np.linalg.norm(t, axis=-1))
    expected = each + np.linalg.norm(o - t) / np.linalg.norm(t)
    before = float(hidden_loss(output, Batch(output, target)))
    assert float(token_error(output, target)) == pytest.approx(each, rel=1e-5)
    assert before == pytest.approx(expected, rel=1e-5)
    # The one that all others attend to is lost: a thousandth of the tokens.
    output[:, 0] *= 0.5
    assert float(token_error(output, target)) < 1.02 * each
    assert float(hidden_loss(output, Batch(output, target))) > 3 * before


def test_rates_rise_fall_to_zero_and_follow_the_error():
    parts = schedule(100)
    assert len(parts) == 100
    assert parts[0] == pytest.approx(0.1)
    assert max(parts) == parts[9]
    assert parts[9:] == sorted(parts[9:], reverse=True)
    assert parts[-1] == pytest.approx(0.0, abs=1e-3)
    for error, expected in ((0.9, 0.012), (math.inf, 0.012), (0.01, 0.0004)):
        assert highest_rate(error, at_head=False) == pytest.approx(expected)
    assert highest_rate(0.9, at_head=True) == 0.003


def test_no_error_has_a_gradient():
    output = torch.ones(1, 2, 3, requires_grad=True)
    token_error(output, torch.ones(1, 2, 3)).backward()
    assert output.grad is not None
    assert torch.equal(output.grad, torch.zeros(1, 2, 3))


def train(
    compute: Any, trained: Any, hidden: torch.Tensor, target: torch.Tensor, *more: Any
) -> bool:
    """Train modules with their rates on one batch, in one step."""
    parameters = [(list(each.parameters()), rate) for each, rate in trained]
    steps = [(1.0, Batch(hidden, target))]
    return train_blocks(compute, parameters, steps, error, torch.float32, *more)


def error(output_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    return token_error(output_BTD, batch.dense_BTD)


def test_training_stops_at_a_loss_that_is_no_number():
    module, hidden = nn.Linear(4, 4), torch.randn(1, 3, 4)
    target = torch.full_like(hidden, torch.nan)
    assert not train(module, [(module, 0.1)], hidden, target, pytest.fail)


def test_blocks_that_train_together_take_steps_by_their_own_drift():
    torch.manual_seed(0)
    module, still = nn.Linear(8, 8), nn.Linear(8, 8)
    before = [parameter.clone() for parameter in still.parameters()]
    hidden = torch.randn(2, 16, 8)
    target = torch.randn(2, 16, 8)
    size = float(module.weight.detach().square().mean().sqrt())
    first = module.weight.detach().clone()
    compute = nn.Sequential(module, still)
    assert train(compute, [(module, 0.1), (still, 0.0)], hidden, target)
    assert all(torch.equal(a, b) for a, b in zip(before, still.parameters(), strict=True))
    # Adam's first step is as long as its rate.
    moved = (module.weight.detach() - first).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * size), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("together", [1, 3, 30, 100])
def test_every_block_is_in_one_group(together, monkeypatch):
    monkeypatch.setattr(local_repair, "BLOCKS", together)
    groups = [group_of(index, 30) for index in range(30)]
    assert all(index in group for index, group in enumerate(groups))
    distinct = sorted(set(groups), key=lambda group: group.start)
    assert [index for group in distinct for index in group] == list(range(30))
    assert len(distinct[-1]) == min(2 * together, 30)
    assert all(len(group) == together for group in distinct[:-2])


# Three blocks: one, and the last two. A random model has nothing to do with the text.
LOCAL = ["--repair", "local", "--local-steps", "20"]


def pruned(argv: list[str], out: Path) -> Path:
    assert main([*argv, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def argv(model, text_file) -> Iterator[list[str]]:
    text = ["--data", str(text_file), "--samples", "33", "--seqlen", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_repair, "BLOCKS", 1)
        yield ["prune", str(model), *text, "--multiple", "4", "--sparsity", "0.5"]


@pytest.fixture(scope="module")
def local(argv, tmp_path_factory) -> Path:
    return pruned([*argv, *LOCAL], tmp_path_factory.mktemp("local") / "out")


@pytest.fixture(scope="module")
def ridge(argv, tmp_path_factory) -> Path:
    return pruned(argv, tmp_path_factory.mktemp("ridge") / "out")


def test_it_comes_closer_to_the_dense_model_than_ridge(local, ridge, model):
    steps = read_manifest(local)["repair"]["steps"]
    assert [step["name"] for step in steps] == ["ridge", "sequential", "local"]
    blocks = steps[-1]["blocks"]
    assert len(blocks) == BLOCKS
    assert blocks[1] is None  # the last block speaks for it
    first, _, last = blocks
    assert (first["blocks"], last["blocks"]) == (1, 2)
    assert (first["training_steps"], last["training_steps"]) == (20, 40)
    assert first["kept"] and last["kept"]
    assert first["error_after"] < first["error_before"]
    assert first["loss_after"] < first["loss_before"]
    assert last["loss_after"] < last["loss_before"]
    tokens = torch.arange(64)[None] * 7 % 320
    dense, one, other = (cfsp.load(path)(tokens).logits.detach() for path in (model, local, ridge))
    assert (one - dense).square().mean() < (other - dense).square().mean()


def test_shapes_and_everything_outside_of_blocks_are_those_of_ridge(local, ridge):
    assert (local / "cfsp_plan.json").read_bytes() == (ridge / "cfsp_plan.json").read_bytes()
    trained = changed(ridge, local)
    assert all(name.startswith("model.layers.") for name in trained)
    ffns = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert {name for name in tensors(ridge) if name.endswith(ffns)} <= trained


def test_a_block_that_training_worsens_stays_as_it_was(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local_repair, "highest_rate", lambda *args, **kwargs: 100.0)
    trained = pruned([*argv, *LOCAL], tmp_path / "out")
    assert "training was rejected for blocks 0, 1, 2" in capsys.readouterr().err
    before = {name: step for name, step in ladder.STEPS["local"].items() if name != "local"}
    monkeypatch.setitem(ladder.STEPS, "local", before)
    assert not changed(trained, pruned([*argv, *LOCAL], tmp_path / "untrained"))


def test_interrupted_it_gives_the_same_bits(local, argv, tmp_path, monkeypatch, noted, command):
    out = tmp_path / "out"
    asked = [*argv, "--memory-budget", "1KB", *LOCAL, "--out", out]
    # The second group of blocks.
    noted(local_repair, "train_blocks", lambda *_, **__: None, dies_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(work_dir, "SHARE_OF_TIME", float("inf"))
        command(*asked, status=130)
    assert entries(tmp_path) == {"out.work"}
    assert f"local: going on at block 1 of {BLOCKS}" in command(*asked).err
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


# Of Llama's kind are all other tests.
KINDS = (
    TRAINED
    if "CFSP_EVERY_FAMILY" in os.environ
    else ("gemma2", "gpt2", "opt-projected", "stablelm-parallel")
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_dense_model(name, tokenizer, text_file):
    settings = PruneSettings(
        Budget(0.5, multiple=4),
        text=CalibrationText((str(text_file),), samples=32, seqlen=32),
        repair="local",
        local=LocalTraining(steps=15),
    )
    dense = build_tiny_model(name)
    ridge = prune_model(dense, tokenizer, replace(settings, repair="ridge"))
    local = prune_model(dense, tokenizer, settings)
    tokens = draw_windows([str(text_file)], tokenizer, samples=8, seqlen=32, seed=7).tokens_NT
    with torch.inference_mode():
        target, plain, trained = (model(tokens).logits for model in (dense, ridge, local))
    assert (trained - target).square().mean() < (plain - target).square().mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_trains_models_of_16_bits(dtype, argv, tmp_path):
    out = pruned([*argv, *LOCAL, "--samples", "17", "--dtype", dtype], tmp_path / "out")
    _ridge, fitted, trained = (step["blocks"] for step in read_manifest(out)["repair"]["steps"])
    assert all(block["loss_after"] <= block["loss_before"] for block in fitted)
    assert any(block["kept"] for block in fitted)
    assert all(block["kept"] for block in trained if block is not None)


@pytest.mark.parametrize(("windows", "asked"), [(2, 2), (9, 2), (65, 8)])
def test_every_window_is_fitted_to_or_held_out(windows, asked):
    tokens_NT = torch.zeros(windows, 16, dtype=torch.int64)
    text = Windows(tokens_NT, {"one": windows // 2, "two": -(-windows // 2)})
    split = Split(text, 16 * asked, Team())
    assert split.fitted
    assert sorted([*split.held_out, *split.fitted]) == list(range(windows))
    if windows >= 4:  # some of both texts
        assert min(split.held_out) < windows // 2 <= max(split.held_out)
    assert [i for batch in split.judged for i in batch] == split.held_out
    assert [i for batch in split.batches for i in batch] == list(range(windows))
    assert {len(batch) for batch in (*split.judged, *split.batches)} <= split.batch_sizes


# The divergence at the head, and blocks as one function.


def leaving_hidden(model: Any, source: LoadedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """What leaves the last block."""
    left: list[Any] = []
    last = blocks_of(model, source.architecture)[-1]
    handle = last.register_forward_hook(lambda module, args, output: left.append(output))
    with torch.no_grad():
        model(tokens_BT)
    handle.remove()
    hidden: torch.Tensor = left[0][0] if isinstance(left[0], tuple) else left[0]
    return hidden


def batch_of(target_BTD: torch.Tensor, turn: int = 0) -> Batch:
    return Batch(torch.empty(0), target_BTD, turn)


@pytest.mark.parametrize("name", sorted(DENSE_CONFIGS))
def test_loss_at_the_head_is_that_of_the_whole_models(name):
    model, tokens_BT = build_tiny_model(name), random_tokens(2, 12)
    source = LoadedModel(model)
    # Another text's hidden states are predictions from this model too.
    other_BT = random_tokens(2, 13)[:, 1:]
    with torch.no_grad():
        logits = [model(each).logits for each in (tokens_BT, other_BT)]
    divergence = numpy_divergence(*logits)[:, :-1].mean()
    dense_BTD, other_BTD = (leaving_hidden(model, source, each) for each in (tokens_BT, other_BT))
    loss_of, left_BTD = HeadLoss(source, RUNTIME), other_BTD.clone().requires_grad_(True)
    loss = loss_of(left_BTD, batch_of(dense_BTD))
    assert float(loss.detach()) == pytest.approx(float(divergence), rel=1e-4)
    loss.backward()
    assert left_BTD.grad is not None
    assert float(left_BTD.grad.abs().max()) > 0
    assert float(loss_of(dense_BTD, batch_of(dense_BTD))) == 0


def test_every_turn_is_judged_at_other_positions():
    model, tokens_BT = build_tiny_model("llama"), random_tokens(4, 128)
    source = LoadedModel(model)
    loss_of = HeadLoss(source, RUNTIME)
    hidden_BTD = leaving_hidden(model, source, tokens_BT)
    changed_BTD = hidden_BTD.clone()
    changed_BTD[:, ::2] = 0  # 512 tokens: every second is judged, first those that changed
    losses = [float(loss_of(changed_BTD, batch_of(hidden_BTD, turn))) for turn in range(4)]
    assert losses[1] == losses[3] == 0
    assert losses[0] == losses[2] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma3_text"])
def test_a_group_computes_what_the_pruned_model_does(name):
    dense, tokens_BT = build_tiny_model(name), random_tokens(2, 12)
    source = LoadedModel(dense)
    kept = (range(0, WIDTH, 2), range(WIDTH), range(8))
    plan = plan_keeping(source, [tuple(channels) for channels in kept], Dropped())
    model = build_pruned_model(source, plan, {})
    blocks = blocks_of(model, source.architecture)
    with torch.no_grad(), hidden_states_entering(blocks) as entering_L:
        model(tokens_BT)
    skeleton = build_skeleton(model.config, torch.float32)
    base = model.get_submodule(source.architecture.decoder)
    calls, _ = record_calls(base, blocks, tokens_BT)
    pruned = PrunedSource(source, plan, {})
    modules = blocks_of(skeleton, source.architecture)
    group = BlockGroup(pruned, modules, range(2), {2: calls[:2]}, RUNTIME)
    group.fill()
    with torch.no_grad():
        assert torch.equal(group(entering_L[0]), entering_L[2])
    trained = {name: p for block in group.fill_for_training() for name, p in block.items()}
    output = group(entering_L[0].clone())
    torch.testing.assert_close(output.detach(), entering_L[2])
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    matrices = {(unit.gate, unit.up, unit.down) for unit in source.units[:2]}
    assert sum(name.endswith("weight") for name in trained) == 2 * len({*matrices.pop()} - {None})
    changed = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    group.fill(changed)
    with torch.no_grad():
        assert not torch.equal(group(entering_L[0]), entering_L[2])
