"""Recovery of any decoder: experts, several FFNs in a block or none, names that differ in files."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cfsp
from builders import changed, edit_tensors, tensors
from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import Checkpoint
from cfsp.recovery.adaptation import (
    attach,
    load_to_train,
    merge,
    multiplies_by_its_matrix,
    ranks_of,
    trained_parameters,
)
from cfsp.recovery.recover import copy_everything_else, write_recovered_weights
from cfsp.recovery.settings import Adaptation
from recovery.conftest import recover, training
from tiny_decoders import tiny_model

# Blocks without an FFN, several in a block, other names in files than in memory, matrices of
# classes of their own. Adapters stay off experts, off biases and off what fused kernels take.
BY_ADAPTERS = ("nemotron_h", "falcon", "gemma3", "deepseek_v3")
# Full training does not; transposed experts, and routers of classes of their own.
IN_FULL = ("nemotron_h", "gpt_oss", "granitemoehybrid", "llama4_text")
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


@pytest.mark.parametrize(("name", "method"), [("mixtral", "full"), ("deepseek_v3", "lora")])
def test_what_is_written_computes_what_was_trained(name, method, pruned_type, tmp_path):
    """Experts change in full training alone."""
    source, out = Checkpoint(pruned_type(name)), tmp_path / "out"
    out.mkdir()
    model: Any = cfsp.load(source.directory)
    before = {key: value.clone() for key, value in model.named_parameters()}
    names = trained_parameters(source, is_full=method == "full")
    assert any(".experts." in f"{each}." for each in names) == (name == "mixtral")
    rank_L = ranks_of(source, Adaptation(method, rank=2))
    adapted = attach(model, source.architecture, names, rank_L)
    architecture = source.architecture
    blocks = map(architecture.block_prefix, range(architecture.block_count))
    assert all(any(name.startswith(block) for name in names) for block in blocks)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = adapted(input_ids=TOKENS_BT).logits
    merged = merge(adapted)
    same = {key for key in before if torch.equal(merged.get_parameter(key), before[key])}
    assert same == before.keys() - set(names)
    write_recovered_weights(source, merged, names, out)
    copy_everything_else(source, out)
    assert tensors(out).keys() == tensors(source.directory).keys()
    with torch.no_grad():
        found = cfsp.load(out)(input_ids=TOKENS_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "lora") for name in BY_ADAPTERS] + [(name, "full") for name in IN_FULL],
)
def test_any_decoder_recovers(name, method, pruned_type, text_file, tmp_path, command):
    pruned, out = pruned_type(name), tmp_path / "out"
    how = training(6, learning_rate=3e-3)
    report = recover(pruned, out, text_file, training=how, adaptation=Adaptation(method, rank=2))
    assert report.history[-1]["held_out"] < report.history[0]["held_out"]
    source = Checkpoint(pruned)
    found = changed(pruned, out)
    units = [unit for unit in source.units if method == "full" or not unit.routed]
    assert stored_matrices(source, units) <= found
    assert not any("norm" in stored or "embed" in stored for stored in found)
    command("verify", out)


def test_how_evenly_experts_are_used_is_no_part_of_the_loss(save):
    source = Checkpoint(save(tiny_model("mixtral", output_router_logits=True)))
    losses = [
        model(input_ids=TOKENS_BT, labels=TOKENS_BT, output_router_logits=asked).loss.item()
        for model, asked in (
            (cfsp.load(source.directory), False),
            (load_to_train(source, torch.device("cpu"), "auto", stays_on_cpu=True), None),
        )
    ]
    assert losses[0] == losses[1]


def test_what_the_model_does_not_have_travels(pruned_type, text_file, tmp_path):
    source = Path(shutil.copytree(pruned_type("deepseek_v3"), tmp_path / "with-mtp"))
    # The layer that predicts a second token: transformers has no module for it.
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(32, 64),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(48, 32),
    }
    edit_tensors(source / "model.safetensors", lambda found: found.update(extra))
    assert set(Checkpoint(source).stored.unused) == set(extra)
    recover(source, tmp_path / "out", text_file, training=training(2))
    assert changed(source, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


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
