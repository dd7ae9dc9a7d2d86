"""Multimodal checkpoints: the text decoder is pruned where it stands, all else travels untouched.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import cfsp
from any_models import tiny_model
from cfsp.checkpoint.reading import LoadedModel
from cfsp.result.prune_report import PruneReport
from cfsp.whole_model.masks import masked_channels
from forks import Forks, Job
from image_inputs import image_inputs
from multimodal_process import results_of

TYPES = (
    "gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava_onevision", "internvl",
    "smolvlm", "llama4", "paligemma", "glm4v", "qwen3_5", "llava",
)  # fmt: skip
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
def case(
    request: pytest.FixtureRequest,
    tokenizer: Any,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
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


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4)


def test_stock_software_runs_it_as_the_same_class(case: Case, forks: Forks, tmp_path: Path) -> None:
    torch.save(case.inputs, tmp_path / "inputs.pt")
    arguments = {"checkpoint": str(case.out), "directory": str(tmp_path)}
    (finished,) = forks(Job("multimodal_process.check", arguments))
    assert finished.status == 0, finished.stderr
    found = torch.load(tmp_path / "found.pt")

    expected = case.masked_results()
    dense = results_of(case.dense, case.inputs)
    for name in case.inputs:
        assert (expected[name] - dense[name]).abs().max() > 1e-2  # the mask bites
    assert_close(found, expected)
    assert_close(found["resaved"], expected)
    assert found["base"]
    names = [f"Pruned{type(case.dense).__name__}"]
    assert found["classes"][:1] == names


def test_all_but_the_ffns_of_the_decoder_is_untouched(case: Case) -> None:
    before = load_file(case.source / "model.safetensors")
    after = load_file(case.out / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    source = LoadedModel(case.dense)
    assert changed <= {name for name in before if source.layout_of(name) is not None}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)
    for name in (*BESIDE, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (case.out / name).read_bytes() == (case.source / name).read_bytes(), name
    config = json.loads((case.source / "config.json").read_text())
    pruned = json.loads((case.out / "config.json").read_text())
    ours = {"architectures", "auto_map", "ffn_widths"}
    assert {key for key in pruned if pruned[key] != config.get(key)} == ours
    assert pruned["auto_map"].keys() >= {"AutoModel", "AutoModelForImageTextToText"}


def test_in_memory(case: Case, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    smaller = cfsp.prune(case.dense, tokenizer, data=[text_file], **SETTINGS)
    assert isinstance(smaller, type(case.dense))
    expected = results_of(smaller, case.inputs)
    assert_close(expected, case.masked_results())
    smaller.save_pretrained(tmp_path)
    assert_close(results_of(cfsp.load(tmp_path), case.inputs), expected)
    assert list(load_file(tmp_path / "model.safetensors")) == list(
        load_file(case.out / "model.safetensors")
    )
