"""The family contract, once for every tiny model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cfsp.checkpoint.families import FAMILIES, family_of, family_of_type
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    Gemma3Config,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)

import cfsp
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_layout import ChannelLayout
from cfsp.cli import main
from cfsp.errors import UnsupportedModelError
from conftest import REPOSITORY
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma3Config(), r"'gemma3' is multimodal.* tower is gemma3_text: save that .* prune it"),
        (LlavaConfig(), r"'llava' is multimodal.* tower is llama: save that .* prune it"),
        (Qwen2_5_VLConfig(), r"tower is qwen2_5_vl_text: which is not supported either; .*llama"),
    ],
)
def test_multimodal_model_is_refused_with_the_name_of_its_text_tower(
    config: PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(config)


def test_text_tower_is_pruned_by_the_lines_of_the_documentation(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    text = TINY_CONFIGS["gemma3_text"]()
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    names = {name: str(tmp_path / name.lower()) for name in ("MODEL", "TOWER", "PRUNED", "OUT")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(names["MODEL"])
    tokenizer.save_pretrained(names["MODEL"])

    document = (REPOSITORY / "docs" / "families.md").read_text()
    section = document.split("## Multimodal models")[1].split("\n## ")[0]
    take_out, put_back = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [command] = re.findall(r"^    cfsp (.*)$", section, re.MULTILINE)
    exec(take_out, names)
    words = [names.get(word, word) for word in command.split()]
    words += ["--data", str(text_file), "--samples", "4", "--seqlen", "32", "--multiple", "8"]
    assert main(words) == 0
    exec(put_back, names)

    smaller = AutoModelForImageTextToText.from_pretrained(names["OUT"]).eval()
    assert type(smaller) is type(whole)
    tokens_BT = torch.arange(8, 40)[None]
    expected = cfsp.load(names["PRUNED"])(input_ids=tokens_BT).logits
    torch.testing.assert_close(smaller(input_ids=tokens_BT).logits, expected, rtol=1e-5, atol=1e-5)
    before, after = whole.state_dict(), smaller.state_dict()
    narrower = {name for name in before if before[name].shape != after[name].shape}
    assert narrower
    assert all(".language_model." in name and ".mlp." in name for name in narrower)
    others = [name for name in before if name not in narrower]
    assert all(torch.equal(before[name], after[name]) for name in others)


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


def test_documentation_names_every_family() -> None:
    table = (REPOSITORY / "docs" / "families.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows for name in row.split(",")} - {"model type"}
    assert named == FAMILIES.keys()
