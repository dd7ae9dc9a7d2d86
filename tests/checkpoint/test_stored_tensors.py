"""Stored tensors and parameters in memory: every one accounted for, in both directions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from any_models import model_class, tiny_config, tiny_model
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.checkpoint.conversion import saved_state
from cfsp.checkpoint.stored_tensors import StoredTensors, stored_from_memory
from cfsp.checkpoint.tensor_file import TensorFile

TYPES = (
    "llama", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text",
    "granitemoehybrid", "jamba", "phi3", "glm4_moe", "qwen3_next", "gemma3", "qwen2_5_vl",
    "mistral3", "olmoe", "ernie4_5_vl_moe", "qwen3_vl_moe", "minimax_m3_vl", "hrm_text",
)  # fmt: skip


class Saved:
    """A model, the file that it was saved to, and what cfsp makes of that."""

    def __init__(self, model_type: str, directory: Path) -> None:
        self.model: Any = tiny_model(model_type)
        self.model.save_pretrained(directory)
        self.file = TensorFile(directory / "model.safetensors")
        self.empty: Any = on_meta(model_type)
        self.architecture = find_architecture(self.empty)
        self.stored = StoredTensors.of(self.empty, self.architecture, self.file.specs)


def on_meta(model_type: str) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return model_class(model_type)._from_config(tiny_config(model_type))


@pytest.fixture(scope="module", params=TYPES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp(request.param))


def test_every_parameter_is_assembled(saved: Saved) -> None:
    state = saved.model.state_dict()
    for name, value in state.items():
        name = saved.stored.tied.get(name, name)
        assert torch.equal(saved.stored.assemble(name, saved.file.read), value), name


def test_every_stored_tensor_is_accounted_for(saved: Saved) -> None:
    stored = saved.stored
    names = saved.empty.state_dict()
    taken = [source for name in names for source in stored.sources(name)]
    assert {*taken, *stored.unused} == set(saved.file.specs)
    assert stored.unused == stored.stale == ()
    assert not stored.faults
    stored.check_complete("it")


def test_memory_is_seen_as_it_would_be_stored(saved: Saved) -> None:
    tensors = stored_from_memory(saved.model)
    assert set(tensors) == set(saved.file.specs)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved.file.read(name)), name


def random_kept(architecture: Architecture) -> list[list[list[int]]]:
    """Return the channels that each FFN of each unit keeps: two thirds, each its own."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            sorted(torch.randperm(unit.width, generator=generator)[: unit.width * 2 // 3].tolist())
            for _ in range(unit.ffns)
        ]
        for unit in architecture.units
    ]


def cut_in_memory(
    model: nn.Module, architecture: Architecture, kept: list[list[list[int]]]
) -> Iterator[tuple[str, Tensor]]:
    for unit, kept_of_unit in zip(architecture.units, kept, strict=True):
        for name, axis in unit.axes.items():
            full_name = architecture.block_prefix(unit.block) + name
            whole = model.get_parameter(full_name)
            if not unit.routed:
                yield full_name, axis.select(whole, kept_of_unit[0])
                continue
            experts = [
                axis.select(whole[e : e + 1], kept_K) for e, kept_K in enumerate(kept_of_unit)
            ]
            yield full_name, torch.cat(experts)


def test_cutting_stored_tensors_is_cutting_in_memory(saved: Saved) -> None:
    architecture, stored = saved.architecture, saved.stored
    kept = random_kept(architecture)
    model = copy.deepcopy(saved.model)
    for name, tensor in cut_in_memory(saved.model, architecture, kept):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    expected = revert_weight_conversion(model, saved_state(model))
    assert set(expected) == set(saved.file.specs)
    for name, tensor in expected.items():
        cut, spec = saved.file.read(name), saved.file.specs[name]
        layout = stored.layout_of(name)
        if layout is not None:
            unit = architecture.units[layout.unit]
            assert layout.width(spec.shape) == unit.width
            cut, whole = layout.select(cut, kept[layout.unit]), cut
            spec = layout.resized(spec, unit.width * 2 // 3)
            padded = layout.pad(cut, unit.width)
            assert padded.shape == whole.shape
            every = list(range(unit.width * 2 // 3))
            assert torch.equal(layout.select(padded, [every] * unit.ffns), cut)
            assert padded.count_nonzero() == cut.count_nonzero()
        assert spec.shape == cut.shape, name
        assert torch.equal(cut, tensor), name


def matrices_in_memory(model: nn.Module, architecture: Architecture, unit: int) -> Iterator[Any]:
    """Yield gate (or None), up and down of every FFN of a unit, as outputs x inputs."""
    found = architecture.units[unit]
    hidden = model.config.get_text_config().hidden_size
    for ffn in range(found.ffns):
        matrices: list[Tensor | None] = []
        for role in ("gate", "up", "down"):
            name = getattr(found, role)
            if name is None:
                matrices.append(None)
                continue
            matrix = model.get_parameter(architecture.block_prefix(found.block) + name)
            matrix = matrix[ffn] if found.routed else matrix
            axis = found.axes[name]
            dim = axis.axis - found.routed
            if role == "down":
                matrix = matrix if dim == 1 else matrix.T
            else:
                matrix = matrix if dim == 0 else matrix.T
                part = ("gate", "up").index(role)
                if axis.fusion == "halves":
                    matrix = matrix.chunk(2)[part]
                elif axis.fusion == "interleaved":
                    matrix = matrix[part::2]
            assert matrix.shape == ((hidden, found.width), (found.width, hidden))[role != "down"]
            matrices.append(matrix)
        yield matrices


def test_matrices_are_read_and_written(saved: Saved) -> None:
    read = saved.file.read
    for index, unit in enumerate(saved.architecture.units):
        in_memory = list(matrices_in_memory(saved.model, saved.architecture, index))
        for ffn, expected in enumerate(in_memory):
            for role, matrix in zip(("gate", "up", "down"), expected, strict=True):
                found = saved.stored.matrix(index, role, ffn, read)
                assert (found is None) == (matrix is None)
                assert matrix is None or torch.equal(found, matrix)
        tensors = saved.stored.down_tensors(index, [down for _, _, down in in_memory])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, read(name)) and tensor.is_contiguous()
        downs = [down[:, : unit.width // 2] for _, _, down in in_memory]
        narrow = saved.stored.down_tensors(index, downs)
        for ffn, down in enumerate(downs):
            assert torch.equal(saved.stored.matrix(index, "down", ffn, narrow.get), down)
