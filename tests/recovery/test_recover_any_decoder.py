"""Recovery of any decoder: experts, several FFNs in a block or none, names that differ in files."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cfsp
from builders import changed, edit_tensors
from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import Checkpoint
from cfsp.quality.perplexity import loss_in_memory
from cfsp.recovery.adaptation import load_to_train, multiplies_by_its_matrix
from cfsp.recovery.data import read_text
from cfsp.recovery.settings import Adaptation
from cfsp.text.windows import Windows
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


def with_a_layer_that_predicts_a_second_token(pruned: Path, place: Path) -> Path:
    """Return a copy with tensors for which transformers has no module: they travel untouched."""
    source = Path(shutil.copytree(pruned, place / "with-mtp"))
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(32, 64),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(48, 32),
    }
    edit_tensors(source / "model.safetensors", lambda found: found.update(extra))
    assert set(Checkpoint(source).stored.unused) == set(extra)
    return source


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "lora") for name in BY_ADAPTERS] + [(name, "full") for name in IN_FULL],
)
def test_any_decoder_recovers(name, method, pruned_type, text_file, tokenizer, tmp_path, command):
    """What is written computes what was trained; experts change in full training alone."""
    pruned, out = pruned_type(name), tmp_path / "out"
    if name == "deepseek_v3":
        pruned = with_a_layer_that_predicts_a_second_token(pruned, tmp_path)
    how = training(6, learning_rate=3e-3)
    report = recover(pruned, out, text_file, training=how, adaptation=Adaptation(method, rank=2))
    first, *others = (entry["held_out"] for entry in report.history)
    assert others[-1] < first
    held_NT = read_text([str(text_file)], tokenizer, seqlen=32).held_out.token_NT
    loss = loss_in_memory(cfsp.load(out), Windows(held_NT, {}))
    assert loss == pytest.approx(min(others), rel=1e-4)
    source = Checkpoint(pruned)
    found = changed(pruned, out)
    units = [unit for unit in source.units if method == "full" or not unit.routed]
    assert stored_matrices(source, units) <= found
    assert method == "full" or not any(".experts." in stored for stored in found)
    blocks = {re.search(r"\.(\d+)\.", stored)[1] for stored in found}
    assert len(blocks) == source.architecture.block_count
    assert not any("norm" in stored or "embed" in stored for stored in found)
    assert not found & set(source.stored.unused)
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
