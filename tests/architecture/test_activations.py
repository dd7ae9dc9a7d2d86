"""Activations of any FFN unit: rows that make up what the unit gives, and the token of each."""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from architecture_contract import down_of
from cfsp.architecture.activations import Products, observed_activations
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture, ChannelAxis, Unit
from cfsp.errors import UnsupportedModelError
from tiny_decoders import tiny_model

TOKENS = torch.randint(2, 290, (2, 12), generator=torch.Generator().manual_seed(0))

OBSERVED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3",
    "granitemoehybrid", "jamba", "nemotron_h", "qwen3_next", "phi3", "gpt2", "falcon", "opt",
    "gemma4_text", "gemma3n_text", "deepseek_v4", "step3p7",
)  # fmt: skip


@dataclass
class Shown:
    """Activations of one FFN of a unit, the token of each row, and what an expert adds to it."""

    ffn: int
    act_RF: Tensor
    token_R: Tensor
    added_RD: Tensor | None = None


def run_observed(model: nn.Module, found: Architecture) -> tuple[list[tuple[Unit, Any]], Tensor]:
    """Run a model; return each unit with what was shown of it and its output, and the logits."""
    shown: dict[tuple[int, int], list[Shown]] = defaultdict(list)
    seen: list[tuple[Unit, Any]] = []
    with ExitStack() as stack, torch.inference_mode():
        for index, block in enumerate(model.get_submodule(found.blocks)):
            units = found.units_of(index)
            for position, unit in enumerate(units):
                path = unit.path if unit.routed else unit.down.rpartition(".")[0]
                outputs: list[Tensor] = []
                seen.append((unit, (shown[index, position], outputs)))
                handle = block.get_submodule(path).register_forward_hook(
                    lambda _m, _a, output, outputs=outputs: outputs.append(output.clone())
                )
                stack.callback(handle.remove)

            def on_rows(
                position: int, ffn: int, act_RF: Tensor, token_R: Tensor, index: int = index
            ) -> None:
                shown[index, position].append(Shown(ffn, act_RF.clone(), token_R.clone()))

            def on_output(
                position: int, ffn: int, added_RD: Tensor, token_R: Tensor, index: int = index
            ) -> None:
                shown[index, position][-1].added_RD = added_RD.clone()

            stack.enter_context(observed_activations(block, units, on_rows, on_output))
        return seen, model(input_ids=TOKENS, use_cache=False).logits


@torch.inference_mode()
@pytest.mark.parametrize("model_type", OBSERVED)
def test_rows_make_up_what_the_unit_gives(model_type):
    model = tiny_model(model_type)
    found = find_architecture(model)
    blocks = model.get_submodule(found.blocks)
    plain = model(input_ids=TOKENS, use_cache=False).logits
    seen, observed = run_observed(model, found)
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-5)
    for unit, (shown, (output,)) in seen:
        assert shown, unit.path
        check_output(blocks[unit.block], unit, shown, output.flatten(0, -2))


def check_output(block: nn.Module, unit: Unit, shown: list[Shown], output: Tensor) -> None:
    """Check that rows give what is added to their tokens, and that this is the unit's output."""
    tokens, stem = TOKENS.numel(), unit.down.removesuffix(".weight")
    biases = [p for n, p in block.named_parameters() if n in (f"{stem}.bias", f"{stem}_bias")]
    total_RD = output.new_zeros(tokens, output.shape[-1])
    for each in shown:
        assert each.act_RF.shape == (len(each.token_R), unit.width)
        # Whatever order they come in: sums of them are the same bits.
        assert torch.equal(each.token_R, each.token_R.sort().values)
        product_RD = each.act_RF @ down_of(block, unit, each.ffn).T
        if each.added_RD is None:  # of a dense FFN
            added_RD = product_RD + sum(biases)
        else:
            added_RD = each.added_RD
            for bias_ED in biases:  # times the router's weight
                bias_D = bias_ED[each.ffn]
                share_R = (added_RD - product_RD) @ bias_D / bias_D.square().sum()
                product_RD = product_RD + share_R[:, None] * bias_D
            torch.testing.assert_close(product_RD, added_RD, rtol=1e-5, atol=2e-5)
        total_RD.index_add_(0, each.token_R, added_RD)
    if len(output) == unit.ffns * tokens:  # llama4's experts give what each adds
        output = output.unflatten(0, (unit.ffns, tokens)).sum(0)
    torch.testing.assert_close(total_RD, output, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_observed_experts_compute_the_same_bits(model_type):
    model = tiny_model(model_type).to(torch.bfloat16)
    model.set_experts_implementation("eager")
    unit = next(unit for unit in find_architecture(model).units if unit.routed)
    block = model.model.layers[unit.block]
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(2, 12, 32, generator=generator).to(torch.bfloat16)
    want = block.mlp(hidden_BTD)
    block.forward = lambda hidden: block.mlp(hidden)
    rows: list[Any] = []
    with observed_activations(block, [unit], lambda *row: rows.append(row)):
        got = block(hidden_BTD)
    assert rows
    assert torch.equal(got, want)


def test_experts_of_earlier_transformers_run_one_by_one_too():
    """Where the protocol knew no norm after each expert."""
    model = tiny_model("mixtral")
    model.set_experts_implementation("grouped_mm")
    for module in model.modules():
        vars(module).pop("has_post_expert_norm", None)
    seen, _ = run_observed(model, find_architecture(model))
    # Each expert, not all at once.
    assert all(each.added_RD is not None for _, (shown, _) in seen for each in shown)
    assert all(shown for _, (shown, _) in seen)


def test_what_only_lies_near_a_weight_is_no_part_of_it():
    """Addresses of another tensor, in a storage of its own, tell nothing on some devices."""
    memory = np.ones((8, 4), dtype=np.float32)
    weight, near = torch.from_numpy(memory), torch.from_numpy(memory[4:])
    told: list[str] = []
    with Products({"weight": weight}, lambda name, *_: told.append(name)):
        torch.nn.functional.linear(torch.ones(2, 4), near)
        assert not told
        torch.nn.functional.linear(torch.ones(2, 4), weight[4:])
    assert told == ["weight"]


def test_inputs_of_experts_are_held_until_their_product_alone():
    model = tiny_model("mixtral")
    unit = next(unit for unit in find_architecture(model).units if unit.routed)
    block, held, most = model.model.layers[unit.block], list[Any](), 0
    block.forward = lambda hidden: block.mlp(hidden)

    def look(name: str, part: Tensor, operand: Tensor, product: Tensor) -> None:
        nonlocal most
        held.append(weakref.ref(operand))
        most = max(most, sum(each() is not None for each in held))

    up = {unit.up: block.get_parameter(unit.up)}
    with (
        torch.inference_mode(),
        Products(up, look),
        observed_activations(block, [unit], lambda *_: None),
    ):
        block(torch.randn(2, 12, 32))
    assert len(held) > most == 1


def test_experts_are_themselves_again_afterwards():
    model = tiny_model("llama4_text")
    found = find_architecture(model)
    run_observed(model, found)
    for block in model.model.layers:
        assert not any("forward" in vars(module) for module in block.modules())
        assert not block._forward_hooks and not block._forward_pre_hooks


class FFN(nn.Module):
    """A function of two matrices and the hidden states."""

    def __init__(self, up: Any, down: Any, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.compute = up, down, compute

    def forward(self, hidden_RD: Tensor) -> Tensor:
        return self.compute(self, hidden_RD)


class Block(nn.Module):
    """A block whose FFN is given every token, or every so many."""

    def __init__(self, mlp: nn.Module, step: int = 1) -> None:
        super().__init__()
        self.mlp, self.step = mlp, step

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.mlp(hidden_BTD[:, :: self.step].flatten(0, 1))


def linear_ffn(compute: Callable[[Any, Tensor], Tensor]) -> FFN:
    return FFN(nn.Linear(32, 64), nn.Linear(64, 32), compute)


def weights(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(sizes))


def unit_of(up: str, down: str, axes: tuple[int, int], ffns: int = 1) -> Unit:
    by_name = {up: ChannelAxis(axes[0]), down: ChannelAxis(axes[1])}
    return Unit(0, "mlp", 64, ffns, up, None, down, by_name, routed=ffns > 1)


def of_all_tokens(ffn: FFN, x: Tensor) -> Tensor:
    """Experts that are given all tokens and weighted afterwards, outside."""
    return torch.bmm(torch.bmm(x.expand(4, -1, -1), ffn.up).relu(), ffn.down)


LINEAR = unit_of("mlp.up.weight", "mlp.down.weight", (0, 1))
EXPERTS = FFN(weights(4, 32, 64), weights(4, 64, 32), of_all_tokens)
UNSEEN = {
    "weights them in a way": (Block(EXPERTS), unit_of("mlp.up", "mlp.down", (2, 1), ffns=4)),
    "rows of 12 tokens": (Block(linear_ffn(lambda of, x: of.down(of.up(x).relu())), 2), LINEAR),
    "without its matrix": (
        Block(linear_ffn(lambda of, x: of.up(x).relu() @ of.down.weight.T)),
        LINEAR,
    ),
}


@pytest.mark.parametrize("words", UNSEEN)
def test_what_cannot_be_seen_is_refused(words):
    block, unit = UNSEEN[words]
    with (
        observed_activations(block, [unit], lambda *rows: None),
        pytest.raises(UnsupportedModelError, match=words),
    ):
        block(torch.randn(2, 6, 32))


def test_a_bare_parameter_is_watched():
    block = Block(FFN(weights(32, 64), weights(64, 32), lambda of, x: (x @ of.up).relu() @ of.down))
    unit, hidden = unit_of("mlp.up", "mlp.down", (1, 0)), torch.randn(2, 6, 32)
    shown: list[Any] = []
    with observed_activations(block, [unit], lambda *rows: shown.append(rows)):
        block(hidden)
    ((position, ffn, act_RF, token_R),) = shown
    assert (position, ffn) == (0, 0)
    torch.testing.assert_close(act_RF, (hidden.flatten(0, 1) @ block.mlp.up).relu())
    assert torch.equal(token_R, torch.arange(12))


def test_experts_that_see_some_of_the_tokens_are_refused():
    model = tiny_model("mixtral")
    block = model.model.layers[0]
    units = [unit for unit in find_architecture(model).units if unit.block == 0]
    block.forward = lambda hidden_BTD: block.mlp(hidden_BTD[:, 1:].contiguous())
    with (
        observed_activations(block, units, lambda *rows: None),
        pytest.raises(UnsupportedModelError, match="is given 10 rows of 12 tokens"),
    ):
        block(torch.randn(2, 6, 32))
