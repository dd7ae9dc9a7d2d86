"""Recovery of any decoder: experts, several FFNs in a block or none, names that differ in files."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cfsp
from builders import changed, tensors
from cfsp.architecture.found import Unit
from cfsp.architecture.small_run import SmallRun
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.recovery.adaptation import (
    SCALE,
    attach,
    merge,
    trainable_in_blocks,
    trained_parameters,
    why_experts_stay,
)
from cfsp.recovery.recover import RecoverReport, recover_checkpoint
from cfsp.recovery.settings import Adaptation, Limit, RecoverSettings, Training
from cfsp.recovery.targets import multiplies_by_its_matrix, targets_of
from cfsp.recovery.writing import copy_everything_else, write_recovered_weights

WITH_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
# Transposed experts, experts in modules of their own, blocks without an FFN, several in a block,
# other names in files than in memory, routers and matrices of classes of their own.
BY_ADAPTERS = (
    "gpt_oss", "jamba", "granitemoehybrid", "nemotron_h", "qwen3_next", "falcon", "gemma3",
)  # fmt: skip
# Adapters stay off what fused kernels take, and off biases; full training does not.
IN_FULL = ("nemotron_h", "falcon", "llama4_text")
TOKENS_BT = torch.arange(2, 42).view(2, 20)


def stored_matrices(source: Checkpoint, units: Iterable[Unit]) -> set[str]:
    """Return the stored tensors of the matrices of units."""
    return {
        stored
        for unit in units
        for path in unit.axes
        if not path.endswith("bias")
        for stored in source.stored.sources(source.architecture.block_prefix(unit.block) + path)
    }


def recover(source: Path, out: Path, text: Path, steps: int = 2, **options: Any) -> RecoverReport:
    training = Training(
        Limit(steps=steps), batch_windows=4, seqlen=32, evaluations=2, learning_rate=3e-3
    )
    keep_adapter = options.pop("keep_adapter", False)
    adaptation = replace(Adaptation(rank=2), **options)
    settings = RecoverSettings((str(text),), training, adaptation, keep_adapter=keep_adapter)
    return recover_checkpoint(open_checkpoint(source), out, settings)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_merged_experts_are_the_experts_plus_their_adapters(name, pruned_type, tmp_path):
    source = Checkpoint(pruned_type(name))
    model: Any = cfsp.load(source.directory)
    before = {key: value.clone() for key, value in model.named_parameters()}
    ranks = [2, 1, 3]
    targets = [
        replace(block, rank=rank)
        for block, rank in zip(targets_of(source, Adaptation()), ranks, strict=True)
    ]
    names = trained_parameters(model, targets)
    adapted = attach(model, source.architecture, targets)
    blocks = trainable_in_blocks(model, source.architecture, targets)
    assert [block["rank"] for block in blocks] == ranks
    assert all(block["parameters"] for block in blocks)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)
    adapters = copy.deepcopy(adapted)
    unit = next(unit for unit in source.units if unit.routed)
    parameter = source.architecture.block_prefix(unit.block) + unit.down
    delta = adapter_of(adapters, parameter, rank=ranks[unit.block])
    with torch.no_grad():
        expected = adapters(input_ids=TOKENS_BT).logits

    merged = merge(adapted)
    after = merged.get_parameter(parameter)
    torch.testing.assert_close(after - before[parameter], delta, rtol=1e-4, atol=1e-6)
    untouched = [key for key in before if key not in names]
    assert untouched
    assert all(torch.equal(merged.get_parameter(key), before[key]) for key in untouched)

    out = tmp_path / "out"
    out.mkdir()
    write_recovered_weights(source, merged, names, out)
    copy_everything_else(source, out)
    assert tensors(out).keys() == tensors(source.directory).keys()
    with torch.no_grad():
        found = cfsp.load(out)(input_ids=TOKENS_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def adapter_of(adapted: nn.Module, parameter: str, rank: int) -> Tensor:
    """Return the scale times B A of every expert, from the adapter's own numbers."""
    owner, _, leaf = parameter.rpartition(".")
    wrapper: Any = adapted.get_submodule(f"base_model.model.{owner}")
    while wrapper.parameter_name != leaf:
        wrapper = wrapper.base_layer
    a_RI = wrapper.lora_A["default"].weight
    b_OR = wrapper.lora_B["default"].weight
    shape = wrapper.get_param().shape
    delta = torch.zeros(shape)
    for expert in range(shape[0]):
        a = a_RI[rank * expert : rank * (expert + 1)]
        b = b_OR.view(b_OR.shape[0], rank, shape[0])[:, :, expert]
        product = SCALE * b @ a
        delta[expert] = product if product.shape == shape[1:] and is_outer(wrapper) else product.T
    return delta


def is_outer(wrapper: Any) -> bool:
    """Return whether the parameter is stored outputs x inputs."""
    return not getattr(wrapper.get_base_layer(), "is_transposed", False)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "lora") for name in BY_ADAPTERS] + [(name, "full") for name in IN_FULL],
)
def test_any_decoder_recovers(name, method, pruned_type, text_file, tmp_path):
    pruned, out = pruned_type(name), tmp_path / "out"
    steps = 6 if name == "gpt_oss" else 2
    report = recover(pruned, out, text_file, steps, method=method)
    assert report.history[-1]["held_out"] < report.history[0]["held_out"]
    source = Checkpoint(pruned)
    found = changed(pruned, out)
    assert stored_matrices(source, source.units) <= found
    assert not any("norm" in stored or "embed" in stored for stored in found)
    assert main(["verify", str(out)]) == 0


def test_what_the_model_does_not_have_travels(pruned_type, text_file, tmp_path):
    source = Path(shutil.copytree(pruned_type("deepseek_v3"), tmp_path / "with-mtp"))
    stored = tensors(source)
    # The layer that predicts a second token: transformers has no module for it.
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(32, 64),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(48, 32),
    }
    save_file(stored | extra, source / "model.safetensors", metadata={"format": "pt"})
    assert set(Checkpoint(source).stored.unused) == set(extra)
    recover(source, tmp_path / "out", text_file)
    assert changed(source, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


def test_experts_that_peft_cannot_adapt_stay(pruned_type, monkeypatch):
    source = Checkpoint(pruned_type("mixtral"))
    assert why_experts_stay(source.config, source.architecture, "lora") is None

    def output(run: SmallRun, block: int) -> Tensor:
        raise ValueError("no wrapped experts")

    monkeypatch.setattr(SmallRun, "output", output)
    reason = why_experts_stay(source.config, source.architecture, "lora")
    assert reason is not None
    assert "cannot adapt those of this class (ValueError: no wrapped experts)" in reason
    assert why_experts_stay(source.config, source.architecture, "full") is None
    assert not any(block.experts for block in targets_of(source, Adaptation()))


def test_an_adapter_that_nobody_could_read_is_not_written(pruned_type, text_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"deepseek_v3.*gate_proj.*leave --keep-adapter out"):
        recover(pruned_type("deepseek_v3"), out, text_file, keep_adapter=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*keys did not match any targeted:RuntimeWarning")
def test_the_adapter_of_experts_is_read_again(pruned_type, text_file, tmp_path):
    from peft import PeftModel

    out = tmp_path / "out"
    recover(pruned_type("mixtral"), out, text_file, keep_adapter=True, allocation="importance")
    model: Any = PeftModel.from_pretrained(cfsp.load(pruned_type("mixtral")), out / "adapter")
    with torch.no_grad():
        found = model.eval()(input_ids=TOKENS_BT).logits
        expected = cfsp.load(out)(input_ids=TOKENS_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_class_made_from_linear_is_tried():
    class Scored(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).softmax(-1)

    class Renamed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    assert multiplies_by_its_matrix(nn.Linear(4, 6, device="meta"))
    assert multiplies_by_its_matrix(Renamed(4, 6, device="meta"))
    assert not multiplies_by_its_matrix(Scored(4, 6, device="meta"))
    assert not multiplies_by_its_matrix(nn.Embedding(4, 6, device="meta"))
