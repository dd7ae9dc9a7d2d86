"""Multimodal checkpoints: the text decoder is pruned where it stands, all else travels untouched.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import cfsp
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cli import main
from cfsp.errors import UnsupportedModelError
from cfsp.recovery.loss import loss_inside
from cfsp.result.prune_report import PruneReport
from cfsp.selection.divergence import masked_channels
from forks import Job
from stock import results_of
from tiny_decoders import tiny_model

BEFORE, AFTER = [0, 20, 21], [30, 31, 32, 33]

# How many tokens the image becomes.
IMAGE_TOKENS = {
    "gemma3": 4, "gemma4": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "mistral3": 2,
    "llava_onevision": 10, "internvl": 1, "smolvlm": 1, "llama4": 1, "paligemma": 4, "glm4v": 4,
    "qwen3_5": 4, "llava": 4,
}  # fmt: skip

# Images as rows of patches, with a number of rows and columns beside.
_IN_A_GRID = ("qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5")


# Other names in files, positions of three axes, experts, fused matrices, linear attention.
FIVE = ("gemma3", "qwen2_5_vl", "llama4", "glm4v", "qwen3_5")
TYPES = tuple(IMAGE_TOKENS) if "CFSP_EVERY_FAMILY" in os.environ else FIVE
SETTINGS: dict[str, Any] = {
    "sparsity": 0.4, "multiple": 8, "samples": 4, "seqlen": 32, "repair": "none", "device": "cpu",
}  # fmt: skip

# What a processor needs, by the names that makers give it; nothing here reads them.
BESIDE = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "additional_chat_templates/tools.jinja",
)  # fmt: skip


@dataclass
class Case:
    """A tiny multimodal model, as a checkpoint and in memory, and what pruning made of it."""

    model_type: str
    dense: PreTrainedModel
    source: Path
    out: Path
    report: PruneReport
    inputs: dict[str, dict[str, Tensor]]

    def masked_results(self) -> dict[str, Tensor]:
        kept = dict(enumerate(self.report.plan.kept_channels))
        with masked_channels(LoadedModel(self.dense), self.dense, kept):
            return results_of(self.dense, self.inputs)


def save(model: PreTrainedModel, tokenizer: Any, directory: Path) -> Path:
    """Save a model with a tokenizer and all that a processor may have."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in BESIDE:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps({"file": name}))
    return directory


@pytest.fixture(scope="module", params=TYPES)
def case(request, tokenizer, text_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    dense = tiny_model(request.param)
    source = save(dense, tokenizer, directory / "source")
    report = cfsp.prune(source, out=directory / "out", data=[text_file], **SETTINGS)
    tokens_BT = torch.randint(4, 290, (2, 12), generator=torch.Generator().manual_seed(3))
    inputs = {
        "text": {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)},
        "image": image_inputs(request.param, dense.config),
    }
    return Case(request.param, dense, source, directory / "out", report, inputs)


def image_inputs(model_type: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return what a processor would make of an image with a few words before and behind."""
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    tokens_BT = torch.tensor([[*BEFORE, *IMAGE_TOKENS[model_type] * [image], *AFTER]])
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    inputs |= _pixels(model_type, config)
    if model_type in _IN_A_GRID:
        inputs["mm_token_type_ids"] = (tokens_BT == image).int()
    if model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(tokens_BT)
    return inputs


def _pixels(model_type: str, config: Any) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0))

    tower = config.vision_config
    if model_type in _IN_A_GRID:
        values = 3 * tower.temporal_patch_size * tower.patch_size**2
        return {"pixel_values": random(16, values), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if model_type == "gemma4":
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        values = 3 * tower.patch_size**2
        return {"pixel_values": random(1, 36, values), "image_position_ids": places[None]}
    if model_type == "mistral3":  # two images
        return {"pixel_values": random(2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]] * 2)}
    if model_type == "llava_onevision":  # the image as a whole, and its only part
        return {"pixel_values": random(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    if model_type == "smolvlm":
        return {"pixel_values": random(1, 1, 3, 28, 28)}
    side = 56 if model_type == "gemma3" else 28
    return {"pixel_values": random(1, 3, side, side)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4)


def test_stock_software_runs_it_as_the_same_class(case, forks, tmp_path):
    torch.save(case.inputs, tmp_path / "inputs.pt")
    arguments = {"checkpoint": str(case.out), "directory": str(tmp_path)}
    (finished,) = forks(Job("stock.check_multimodal", arguments))
    assert finished.status == 0, finished.stderr
    found = torch.load(tmp_path / "found.pt")

    expected = case.masked_results()
    dense = results_of(case.dense, case.inputs)
    for name in case.inputs:
        assert (expected[name] - dense[name]).abs().max() > 1e-2  # the mask bites
    assert_close(found, expected)
    assert_close(found["resaved"], expected)
    assert found["base"]
    assert found["classes"][0] == f"Pruned{type(case.dense).__name__}"
    assert found["classes"][1].startswith("Pruned")


def test_what_lies_beside_the_weights_is_untouched(case):
    files = [load_file(at / "model.safetensors") for at in (case.source, case.out)]
    assert list(files[0]) == list(files[1])
    for name in (*BESIDE, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (case.out / name).read_bytes() == (case.source / name).read_bytes(), name
    config = json.loads((case.source / "config.json").read_text())
    pruned = json.loads((case.out / "config.json").read_text())
    ours = {"architectures", "auto_map", "ffn_widths"}
    assert {key for key in pruned if pruned[key] != config.get(key)} == ours
    assert pruned["auto_map"].keys() >= {"AutoModel", "AutoModelForImageTextToText"}


@pytest.fixture(scope="module", params=["names as saved", "names as in memory"])
def gemma(request, tokenizer, tmp_path_factory):
    """A checkpoint whose stored names are not those of the parameters, or are."""
    model = tiny_model("gemma3")
    source = save(model, tokenizer, tmp_path_factory.mktemp("gemma") / "source")
    file = source / "model.safetensors"
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert load_file(file).keys().isdisjoint(state)
    if request.param == "names as in memory":
        save_file(state, file, metadata={"format": "pt"})
    return source


def test_repair_and_recovery_write_the_stored_names(gemma, text_file, tmp_path):
    text = ["--data", str(text_file), "--seqlen", "32"]
    how = ["--sparsity", "0.5", "--set", "multiple=8", "--samples", "65", "--device", "cpu"]
    pruned, trained = tmp_path / "pruned", tmp_path / "trained"
    asked = [*text, *how, "--repair", "local", "--set", "local_steps=8"]
    assert main(["prune", str(gemma), *asked, "--out", str(pruned)]) == 0
    steps = json.loads((pruned / "cfsp.json").read_text())["repair"]["steps"]
    assert [step["name"] for step in steps] == ["ridge", "sequential", "local"]
    # New weights were used and judged: not a block was rejected because nothing had changed.
    for step, judged_by in zip(steps, ("error", "loss", "loss"), strict=True):
        better = [b[f"{judged_by}_after"] < b[f"{judged_by}_before"] for b in step["blocks"] if b]
        assert any(better)

    asked = [*text, "--steps", "1", "--method", "full", "--device", "cpu"]
    assert main(["recover", str(pruned), *asked, "--out", str(trained)]) == 0
    assert main(["verify", str(trained)]) == 0
    files = [load_file(path / "model.safetensors") for path in (gemma, pruned, trained)]
    assert list(files[0]) == list(files[1]) == list(files[2])
    changed = {name for name in files[1] if not torch.equal(files[1][name], files[2][name])}
    assert changed
    assert all(".layers." in name and "vision" not in name for name in changed)


def test_a_class_that_cannot_run_is_not_trained(monkeypatch):
    monkeypatch.delattr(MoeCausalLMOutputWithPast, "image_outputs")
    with (
        pytest.raises(UnsupportedModelError, match=r"Llama4ForCond.* its own forward fails in"),
        loss_inside(tiny_model("llama4")),
    ):
        pass


def test_commands(tokenizer, text_file, tmp_path, capsys):
    source = str(save(tiny_model("qwen2_5_vl"), tokenizer, tmp_path / "source"))
    out = str(tmp_path / "out")
    text = ["--data", str(text_file), "--seqlen", "32"]
    samples, multiple = ["--samples", "4"], ["--set", "multiple=8"]
    asked = ["--sparsity", "0.4", *text, *samples, *multiple, "--eval", str(text_file)]
    assert main(["prune", source, *asked, "--out", out]) == 0
    assert main(["inspect", out]) == 0
    assert main(["verify", out]) == 0
    assert main(["eval", source, out, *text, "--windows", "2"]) == 0
    asked = ["--sparsity", "0.2", *multiple, "--effort", "fast", *text, "--samples", "2"]
    assert main(["prune", out, *asked, "--out", str(tmp_path / "again")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card

    capsys.readouterr()
    for target, name in (("gguf", "x.gguf"), ("vllm", "x"), ("openvino", "x")):
        assert main(["export", out, "--to", target, "--out", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "qwen2_5_vl" in line
        assert not (tmp_path / name).exists()
