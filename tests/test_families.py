"""The family contract, once for every tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Gemma3Config

import cfsp
from cfsp.channel_layout import ChannelLayout
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import UnsupportedModelError
from cfsp.families import FAMILIES, family_of, family_of_type
from family_contract import FamilyContract
from tiny_models import TINY_CONFIGS


def _contract(name: str) -> type[FamilyContract]:
    class_name = "Test" + "".join(part.capitalize() for part in name.split("-"))
    return type(class_name, (FamilyContract,), {"name": name, "__module__": __name__})


for _name in TINY_CONFIGS:
    _class = _contract(_name)
    globals()[_class.__name__] = _class
del _class


def test_every_family_has_a_tiny_model() -> None:
    assert {config().model_type for config in TINY_CONFIGS.values()} == set(FAMILIES)


def test_unknown_family_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(BertConfig())
    assert "'bert'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_multimodal_model_is_refused_with_the_name_of_its_text_tower(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gemma3' is multimodal.*\(gemma3_text\)"):
        Checkpoint(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gemma3' is multimodal.*\(gemma3_text\)"):
        family_of(Gemma3Config())


def test_layout_knows_weights_biases_and_nothing_else() -> None:
    family = family_of_type("llama")
    assert family.layout_of("model.layers.12.mlp.gate_proj.weight") == ChannelLayout(12, 0)
    assert family.layout_of("model.layers.12.mlp.up_proj.bias") == ChannelLayout(12, 0)
    assert family.layout_of("model.layers.12.mlp.down_proj.weight") == ChannelLayout(12, 1)
    # Its length is the hidden size.
    assert family.layout_of("model.layers.12.mlp.down_proj.bias") is None
    assert family.layout_of("model.layers.12.self_attn.q_proj.weight") is None
    assert family.layout_of("prefix.model.layers.1.mlp.up_proj.weight") is None


def test_layout_of_transposed_weights() -> None:
    family = family_of_type("gpt2")
    assert family.layout_of("transformer.h.0.mlp.c_fc.weight") == ChannelLayout(0, 1)
    assert family.layout_of("transformer.h.0.mlp.c_fc.bias") == ChannelLayout(0, 0)
    assert family.layout_of("transformer.h.0.mlp.c_proj.weight") == ChannelLayout(0, 0)
    assert family.layout_of("transformer.h.0.mlp.c_proj.bias") is None
    assert family.layout_of("transformer.h.0.attn.c_proj.weight") is None


def test_layout_of_an_ffn_without_a_module() -> None:
    family = family_of_type("opt")
    assert family.layout_of("model.decoder.layers.2.fc1.bias") == ChannelLayout(2, 0)
    assert family.layout_of("model.decoder.layers.2.fc2.weight") == ChannelLayout(2, 1)


def test_fused_gate_and_up_lose_the_same_channels() -> None:
    layout = family_of_type("phi3").layout_of("model.layers.0.mlp.gate_up_proj.weight")
    assert layout == ChannelLayout(0, 0, parts=2)
    rows = torch.arange(8).unsqueeze(1)
    assert layout.width(rows.shape) == 4
    assert layout.select(rows, [1, 3]).flatten().tolist() == [1, 3, 5, 7]
    assert layout.pad(rows, 5).flatten().tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 7, 0]


def test_checkpoint_of_the_base_model_alone(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Such are GPT-2's on the hub: names without the base model's, and causal masks stored."""
    source = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    stripped["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(stripped, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(source)
    assert checkpoint.specs.keys() == tensors.keys()

    settings = {
        "sparsity": 0.4,
        "multiple": 1,
        "samples": 4,
        "seqlen": 32,
        "data": [str(text_file)],
    }
    expected = cfsp.prune(tiny_checkpoint("gpt2"), out=tmp_path / "expected", **settings)
    found = cfsp.prune(source, out=tmp_path / "found", **settings)
    assert found.parameters_before == expected.parameters_before
    name = "model.safetensors"
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "type", "class", "FFN", "width", "key"]
    assert [row.split()[0] for row in rows] == sorted(FAMILIES)
    assert main(["families", "--json"]) == 0
    listed = {f["model_type"]: f for f in json.loads(capsys.readouterr().out)["families"]}
    assert listed.keys() == FAMILIES.keys()
    assert listed["gpt2"]["width_key"] == "n_inner"
    assert listed["phi3"]["matrices"] == ["mlp.gate_up_proj", "mlp.down_proj"]
    assert listed["opt"]["matrices"] == ["fc1", "fc2"]


def test_documentation_names_every_family() -> None:
    table = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows for name in row.split(",")} - {"model type"}
    assert named == FAMILIES.keys()
