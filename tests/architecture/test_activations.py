"""Activations of any FFN unit: rows that make up what the unit gives, and the token of each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architecture_contract import down_of
from cfsp.architecture.activations import observed_activations
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
class Seen:
    """The rows shown of each FFN of a unit, and what its module, or its down matrix, gave."""

    rows: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    output: Tensor | None = None


def run_observed(model: nn.Module, found: Architecture) -> tuple[dict[Unit | int, Any], Tensor]:
    """Run a model with all units observed; return what was seen of each, and the logits."""
    blocks = model.get_submodule(found.blocks)
    seen: dict[tuple[int, int], Seen] = defaultdict(Seen)
    contexts, handles = [], []
    for index, block in enumerate(blocks):
        units = [unit for unit in found.units if unit.block == index]

        def on_rows(
            position: int, ffn: int, act_RF: Tensor, token_R: Tensor, index: int = index
        ) -> None:
            seen[index, position].rows[ffn].append((act_RF.clone(), token_R.clone()))

        for position, unit in enumerate(units):
            path = unit.path if unit.routed else unit.down.rpartition(".")[0]

            def note(
                module: nn.Module, args: Any, output: Tensor, at: Any = (index, position)
            ) -> None:
                seen[at].output = output.clone()

            handles.append(block.get_submodule(path).register_forward_hook(note))
        contexts.append(observed_activations(block, units, on_rows))
    for context in contexts:
        context.__enter__()
    try:
        with torch.inference_mode():
            logits = model(input_ids=TOKENS, use_cache=False).logits
    finally:
        for context in contexts:
            context.__exit__(None, None, None)
        for handle in handles:
            handle.remove()
    return seen, logits


@torch.inference_mode()
@pytest.mark.parametrize("model_type", OBSERVED)
def test_rows_make_up_what_the_unit_gives(model_type: str) -> None:
    model = tiny_model(model_type)
    found = find_architecture(model)
    blocks = model.get_submodule(found.blocks)
    plain = model(input_ids=TOKENS, use_cache=False).logits
    seen, observed = run_observed(model, found)
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-5)
    for index, block in enumerate(blocks):
        units = [unit for unit in found.units if unit.block == index]
        for position, unit in enumerate(units):
            unit_seen = seen[index, position]
            assert unit_seen.output is not None
            assert unit_seen.rows, unit.path
            check_output(block, unit, unit_seen)


def check_output(block: nn.Module, unit: Unit, seen: Seen) -> None:
    """Check that the rows, at their tokens, add up to the unit's output but for its bias."""
    output = seen.output.flatten(0, -2)
    tokens = TOKENS.numel()
    assert set(seen.rows) <= set(range(unit.ffns))
    total_RD = output.new_zeros(tokens, output.shape[-1])
    for ffn, parts in seen.rows.items():
        for act_RF, token_R in parts:
            assert act_RF.shape == (len(token_R), unit.width)
            total_RD.index_add_(0, token_R, act_RF @ down_of(block, unit, ffn).T)
    if len(output) == unit.ffns * tokens:  # llama4's experts give what each adds
        output = output.unflatten(0, (unit.ffns, tokens)).sum(0)
    rest_RD = output - total_RD
    bias = [name for name, _ in block.named_parameters() if is_down_bias(name, unit)]
    if bias and unit.routed:
        # The bias of each expert, times the router's weight, which lies in a few directions.
        bias_ED = block.get_parameter(bias[0])
        share_RE = torch.linalg.lstsq(bias_ED.T, rest_RD.T).solution.T
        rest_RD = rest_RD - share_RE @ bias_ED
        chosen_RE = torch.zeros_like(share_RE)
        for ffn, parts in seen.rows.items():
            chosen_RE[parts[0][1], ffn] = 1
        torch.testing.assert_close(share_RE * (1 - chosen_RE), share_RE * 0, rtol=0, atol=1e-3)
    elif bias:
        rest_RD = rest_RD - block.get_parameter(bias[0])
    torch.testing.assert_close(rest_RD, torch.zeros_like(rest_RD), rtol=0, atol=2e-5)


def is_down_bias(name: str, unit: Unit) -> bool:
    stem = unit.down.removesuffix(".weight")
    return name in (f"{stem}.bias", f"{stem}_bias")


@torch.inference_mode()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_observed_experts_compute_the_same_bits(model_type: str) -> None:
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


def test_experts_are_themselves_again_afterwards() -> None:
    model = tiny_model("llama4_text")
    found = find_architecture(model)
    run_observed(model, found)
    for block in model.model.layers:
        assert not any("forward" in vars(module) for module in block.modules())
        assert not block._forward_hooks and not block._forward_pre_hooks


class _Experts(nn.Module):
    """Experts that are given all tokens and weighted afterwards, outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 32, 64))
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32))

    def forward(self, hidden_RD: Tensor) -> Tensor:
        inner = torch.bmm(hidden_RD.expand(4, -1, -1), self.up_proj)
        return torch.bmm(torch.nn.functional.gelu(inner), self.down_proj)


class _Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        each_ERD = self.mlp(hidden_BTD.flatten(0, 1))
        share_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
        return torch.einsum("erd,e->rd", each_ERD, share_E).view_as(hidden_BTD)


def test_weights_that_cannot_be_seen_are_refused() -> None:
    block = _Block(_Experts())
    unit = Unit(
        0, "mlp", 64, 4, "mlp.up_proj", None, "mlp.down_proj",
        {"mlp.up_proj": ChannelAxis(2), "mlp.down_proj": ChannelAxis(1)}, routed=True,
    )  # fmt: skip
    with (
        observed_activations(block, [unit], lambda *rows: None),
        pytest.raises(UnsupportedModelError, match="weights them in a way"),
    ):
        block(torch.randn(2, 5, 32))


class _Half(nn.Module):
    """An FFN that sees every other token."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.unused = unused

    def forward(self, hidden_RD: Tensor) -> Tensor:
        act = self.up(hidden_RD).relu()
        if self.unused:
            return act @ self.down.weight.T
        return self.down(act)


class _HalfBlock(nn.Module):
    def __init__(self, mlp: nn.Module, step: int) -> None:
        super().__init__()
        self.mlp, self.step = mlp, step

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.mlp(hidden_BTD[:, :: self.step])


@pytest.mark.parametrize(
    ("unused", "step", "words"), [(False, 2, "rows of 12 tokens"), (True, 1, "without its matrix")]
)
def test_rows_of_unknown_tokens_are_refused(unused: bool, step: int, words: str) -> None:
    block = _HalfBlock(_Half(unused), step)
    unit = Unit(
        0, "mlp", 64, 1, "mlp.up.weight", None, "mlp.down.weight",
        {"mlp.up.weight": ChannelAxis(0), "mlp.down.weight": ChannelAxis(1)},
    )  # fmt: skip
    with (
        observed_activations(block, [unit], lambda *rows: None),
        pytest.raises(UnsupportedModelError, match=words),
    ):
        block(torch.randn(2, 6, 32))


def test_a_bare_parameter_is_watched() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(32, 64))
            self.down = nn.Parameter(torch.randn(64, 32))

        def forward(self, hidden: Tensor) -> Tensor:
            return (hidden @ self.up).relu() @ self.down

    block = _HalfBlock(Bare(), 1)
    unit = Unit(
        0, "mlp", 64, 1, "mlp.up", None, "mlp.down",
        {"mlp.up": ChannelAxis(1), "mlp.down": ChannelAxis(0)},
    )  # fmt: skip
    hidden = torch.randn(2, 6, 32)
    shown: list[Any] = []
    with observed_activations(block, [unit], lambda *rows: shown.append(rows)):
        block(hidden)
    ((position, ffn, act_RF, token_R),) = shown
    assert (position, ffn) == (0, 0)
    torch.testing.assert_close(act_RF, (hidden @ block.mlp.up).relu().flatten(0, 1))
    assert torch.equal(token_R, torch.arange(12))


def test_experts_that_see_some_of_the_tokens_are_refused() -> None:
    model = tiny_model("mixtral")
    block = model.model.layers[0]
    units = [unit for unit in find_architecture(model).units if unit.block == 0]
    block.forward = lambda hidden_BTD: block.mlp(hidden_BTD[:, 1:].contiguous())
    with (
        observed_activations(block, units, lambda *rows: None),
        pytest.raises(UnsupportedModelError, match="is given 10 rows of 12 tokens"),
    ):
        block(torch.randn(2, 6, 32))
