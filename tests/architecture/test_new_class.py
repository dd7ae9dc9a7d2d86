"""A decoder that did not exist when cfsp was written is pruned as any other."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import cfsp
import stock
from cfsp.checkpoint.reading import Checkpoint
from toy_decoders import CHANNELS, HIDDEN, ToyConfig, ToyForCausalLM, register

TOKENS = torch.randint(2, 320, (2, 20), generator=torch.Generator().manual_seed(0))


def new_model(trick: str = "") -> PreTrainedModel:
    """Return a model with odd names, a fused interleaved gate, and a block without an FFN."""
    register()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyForCausalLM(ToyConfig(vocab_size=320, trick=trick)).eval()


logits_of = partial(stock.logits_of, tokens_BT=TOKENS)


def masked(plan: cfsp.PruningPlan, trick: str = "") -> PreTrainedModel:
    """Return the original with zeros in the columns of down that go."""
    model: Any = new_model(trick)
    with torch.no_grad():
        for unit in plan.units:
            gone = sorted(set(range(unit.width)) - set(unit.kept))
            model.core.steps[unit.block].thinker.unsqueeze.weight[:, gone] = 0
    return model  # type: ignore[no-any-return]


def load_by_its_own_class(directory: Path) -> PreTrainedModel:
    """Load a checkpoint without cfsp.

    Where a class was registered by hand, transformers' Auto classes take that and no other.
    """
    config = AutoConfig.from_pretrained(directory)
    if getattr(config, "auto_map", None) is None:
        return AutoModelForCausalLM.from_pretrained(directory).eval()
    reference = config.auto_map["AutoModelForCausalLM"]
    pruned: Any = get_class_from_dynamic_module(reference, str(directory))
    return pruned.from_pretrained(directory).eval()  # type: ignore[no-any-return]


@pytest.fixture
def half(few) -> dict[str, Any]:
    """Half of the channels, whichever number of them, go without repair."""
    return {"sparsity": 0.5, "repair": "none", "multiple": 1, **few}


@pytest.mark.parametrize("block_metric", ["angular", "uniform"])
def test_it_is_pruned_saved_and_loaded(tokenizer, save, half, tmp_path, block_metric):
    asked = {"block_metric": block_metric, **half}
    model = new_model()
    smaller = cfsp.prune(model, tokenizer, **asked)
    assert torch.equal(logits_of(model), logits_of(new_model()))
    report = cfsp.prune(save(model), out=tmp_path / "out", **asked)
    expected = logits_of(masked(report.plan))
    assert (expected - logits_of(model)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(smaller), expected, rtol=1e-5, atol=1e-5)
    steps: Any = smaller.core.steps
    first, *others = report.intermediate_sizes
    rows = [step.thinker and step.thinker.squeeze.out_features for step in steps]
    assert rows == [2 * first, None, *(2 * width for width in others)]

    is_stock = type(smaller) is ToyForCausalLM
    assert is_stock == (block_metric == "uniform")
    smaller.save_pretrained(tmp_path / "saved")
    for directory in (tmp_path / "saved", tmp_path / "out"):
        reloaded = load_by_its_own_class(directory)
        assert isinstance(reloaded, ToyForCausalLM)
        assert torch.equal(logits_of(reloaded), logits_of(smaller))
        assert torch.equal(logits_of(cfsp.load(directory)), logits_of(smaller))
        assert Checkpoint(directory).architecture.widths == report.intermediate_sizes
        assert (directory / "modeling_cfsp.py").exists() != is_stock


@pytest.mark.parametrize("block_metric", ["angular", "uniform"])
@pytest.mark.parametrize("trick", ["scaled as it is built", "scaled while it runs"])
def test_a_number_that_also_scales_stays(trick, block_metric, save, half, tmp_path):
    asked = {"block_metric": block_metric, **half}
    plan = cfsp.prune(save(new_model(trick)), out=tmp_path / "out", **asked).plan
    smaller = load_by_its_own_class(tmp_path / "out")
    torch.testing.assert_close(logits_of(smaller), logits_of(masked(plan, trick)))
    assert smaller.config.channels == CHANNELS


def test_ffns_that_cannot_be_cut_keep_their_width(tokenizer, half):
    """One key of the config gives the widths of all, of which only some may change."""
    trick = "weights tied between blocks"
    model = new_model(trick)
    smaller = cfsp.prune(model, tokenizer, **half)
    steps: Any = smaller.core.steps
    widths = [step.thinker and step.thinker.unsqueeze.in_features for step in steps]
    assert widths == [CHANNELS // 2, None, CHANNELS, CHANNELS]
    assert smaller.config.ffn_widths == {"0": {"thinker": CHANNELS // 2}}
    assert smaller.config.channels == CHANNELS


def defined_again(up: str, down: str) -> PreTrainedModel:
    """Return a model of a class that has the same name each time, and other matrices."""

    class CellFFN(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.add_module(up, nn.Linear(HIDDEN, channels))
            self.add_module(down, nn.Linear(channels, HIDDEN))

        def forward(self, x_BTD: Tensor) -> Tensor:
            return self.get_submodule(down)(self.get_submodule(up)(x_BTD).relu())  # type: ignore[no-any-return]

    class CellConfig(ToyConfig):
        model_type = "cfsp_cell"

    class CellForCausalLM(ToyForCausalLM):
        config_class = CellConfig

        def __init__(self, config: CellConfig) -> None:
            super().__init__(config)
            for step in self.core.steps:
                step.thinker = CellFFN(config.channels)

    AutoConfig.register("cfsp_cell", CellConfig, exist_ok=True)
    AutoModelForCausalLM.register(CellConfig, CellForCausalLM, exist_ok=True)
    return CellForCausalLM(CellConfig(vocab_size=320)).eval()


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first"), ("up", "down")])
def test_a_class_that_a_notebook_defines_again_is_proved_again(tokenizer, half, names):
    smaller: Any = cfsp.prune(defined_again(*names), tokenizer, block_metric="uniform", **half)
    up, down = map(smaller.core.steps[0].thinker.get_submodule, names)
    assert (up.out_features, down.in_features) == (CHANNELS // 2, CHANNELS // 2)
