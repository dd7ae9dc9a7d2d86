"""The parts of local repair: the divergence at the head, and blocks as one function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from builders import plan_keeping, random_tokens
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton
from cfsp.cut.surgery import PrunedSource, build_pruned_model
from cfsp.planning.candidate import Dropped
from cfsp.repair.local import HeadLoss
from cfsp.repair.two_streams import Batch, BlockGroup
from cfsp.streaming.block_calls import record_calls
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.stand_in import hidden_states_entering
from tiny_models import DENSE_CONFIGS, WIDTH, build_tiny_model

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


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
        dense, other = (model(each).logits.double().numpy() for each in (tokens_BT, other_BT))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (dense, other))
    divergence = (p * np.log(p / q)).sum(-1)[:, :-1].mean()
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
