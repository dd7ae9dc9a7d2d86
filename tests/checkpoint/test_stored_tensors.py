"""Stored tensors and parameters in memory: every one accounted for, in both directions."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    WeightConverter,
    revert_weight_conversion,
)

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.checkpoint import layout_tracing
from cfsp.checkpoint.conversion import missing_prefix, saved_state, stored_from_memory
from cfsp.checkpoint.ffn_tensors import ffn_matrix, tensors_with_down
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import TensorFile, specs_of
from cfsp.errors import CheckpointError, UnsupportedModelError
from tiny_decoders import model_class, tiny_config, tiny_model

TYPES = (
    "llama", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text",
    "granitemoehybrid", "jamba", "phi3", "glm4_moe", "qwen3_next", "gemma3", "qwen2_5_vl",
    "mistral3", "olmoe", "aria", "inkling_mm_model", "kimi_k25", "minimax_m3_vl", "qwen3_vl_moe",
    "sarvam_moe",
)  # fmt: skip


class Saved:
    """A model, the file that it was saved to, and what cfsp makes of that."""

    def __init__(self, model_type: str, directory: Path) -> None:
        self.directory = directory
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
    for model in (saved.model, type(saved.model).from_pretrained(saved.directory)):
        tensors = stored_from_memory(model)
        assert set(tensors) == set(saved.file.specs)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved.file.read(name)), name


def test_memory_is_not_copied(saved: Saved) -> None:
    own = {tensor.untyped_storage().data_ptr() for tensor in saved.model.state_dict().values()}
    layouts = saved.stored.layouts
    copied = {
        name
        for name, tensor in stored_from_memory(saved.model).items()
        if tensor.untyped_storage().data_ptr() not in own and name in layouts
    }
    assert {layouts[name].axis.fusion for name in copied} <= {"interleaved"}, copied


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
        layout = stored.layouts.get(name)
        if layout is not None:
            unit = architecture.units[layout.unit]
            assert layout.width(spec.shape) == unit.width
            cut = layout.select(cut, kept[layout.unit])
            spec = layout.resized(spec, unit.width * 2 // 3)
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


def matrix_of(
    stored: StoredTensors, unit: int, role: Any, ffn: int, read: Callable[[str], Tensor]
) -> Tensor | None:
    source: Any = SimpleNamespace(stored=stored, read=read)
    return ffn_matrix(source, unit, role, ffn)


def test_matrices_are_read_and_written(saved: Saved) -> None:
    read = saved.file.read
    for index, unit in enumerate(saved.architecture.units):
        in_memory = list(matrices_in_memory(saved.model, saved.architecture, index))
        for ffn, expected in enumerate(in_memory):
            for role, matrix in zip(("gate", "up", "down"), expected, strict=True):
                found = matrix_of(saved.stored, index, role, ffn, read)
                assert (found is None) == (matrix is None)
                assert matrix is None or torch.equal(found, matrix)
        downs = [down for _, _, down in in_memory]
        tensors = tensors_with_down(saved, index, dict(enumerate(downs)))
        for name, tensor in tensors.items():
            assert torch.equal(tensor, read(name)) and tensor.is_contiguous()
        narrow_downs = [down[:, : unit.width // 2] for down in downs]
        narrow = tensors_with_down(saved, index, dict(enumerate(narrow_downs)))
        for ffn, down in enumerate(narrow_downs):
            assert torch.equal(matrix_of(saved.stored, index, "down", ffn, narrow.get), down)


def found_in(model: PreTrainedModel, tensors: dict[str, Tensor]) -> StoredTensors:
    return StoredTensors.of(model, find_architecture(model), specs_of(tensors))


@pytest.mark.parametrize(
    ("model_type", "prefix"), [("gpt2", "transformer."), ("mixtral", "model.")]
)
def test_a_checkpoint_of_the_base_model_lacks_a_prefix(model_type: str, prefix: str) -> None:
    model, base = tiny_model(model_type), tiny_model(model_type).base_model
    without, whole = stored_from_memory(base), stored_from_memory(model)
    assert missing_prefix(model, without) == prefix
    assert missing_prefix(model, whole) == ""
    assert {prefix + name for name in without} == {*whole} - {"lm_head.weight"}
    stored = found_in(model, without)
    assert not stored.unused
    assert set(stored.faults) <= {"lm_head.weight"}
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(stored.assemble(name, without.__getitem__), value)
    layouts = found_in(model, whole).layouts
    assert {prefix + name: layout for name, layout in stored.layouts.items()} == layouts


def test_experts_that_the_hub_has_transposed() -> None:
    model = tiny_model("qwen3_vl_moe")
    modern = stored_from_memory(model)
    old = {
        name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in modern.items()
    }
    stored = found_in(model, old)
    assert all(layout.transposed for layout in stored.layouts.values() if layout.ffn is None)
    for name, value in model.state_dict().items():
        assert torch.equal(stored.assemble(name, old.__getitem__), value)
    for role in ("gate", "up", "down"):
        expected = matrix_of(found_in(model, modern), 1, role, 2, modern.get)
        assert torch.equal(matrix_of(stored, 1, role, 2, old.get), expected)


def with_converters(monkeypatch: pytest.MonkeyPatch, *converters: WeightConverter) -> None:
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda model: list(converters)
    )


@pytest.mark.parametrize("fusion", ["halves", "interleaved"])
@pytest.mark.parametrize("up_first", [False, True])
def test_one_stored_tensor_becomes_gate_and_up(
    monkeypatch: pytest.MonkeyPatch, fusion: str, up_first: bool
) -> None:
    model = tiny_model("llama")
    tensors = stored_from_memory(model)
    for block in range(3):
        mlp = f"model.layers.{block}.mlp"
        parts = [tensors.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
        parts = parts[::-1] if up_first else parts
        fused = torch.cat(parts) if fusion == "halves" else torch.stack(parts, 1).flatten(0, 1)
        tensors[f"{mlp}.fused.weight"] = fused
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    operations = [Chunk(dim=0)] if fusion == "halves" else [Interleave(dim=0), Chunk(dim=0)]
    with_converters(
        monkeypatch,
        WeightConverter("mlp.fused.weight", targets[::-1] if up_first else targets, operations),
    )
    stored = found_in(model, tensors)
    layout = stored.layouts.get("model.layers.1.mlp.fused.weight")
    assert layout is not None
    assert (layout.role, layout.axis.fusion, layout.up_first) == ("both", fusion, up_first)
    for name, value in model.state_dict().items():
        assert torch.equal(stored.assemble(name, tensors.__getitem__), value)
    kept = [5, 8, 90]
    cut = {"fused": layout.select(tensors["model.layers.1.mlp.fused.weight"], [kept])}
    for role in ("gate", "up"):
        whole = getattr(model.model.layers[1].mlp, f"{role}_proj").weight
        assert torch.equal(matrix_of(stored, 1, role, 0, tensors.get), whole)
        assert torch.equal(layout.matrix(cut["fused"], role, 0), whole[kept])


def test_what_cannot_be_cut_along_one_axis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tensors = stored_from_memory(model)
    for block in range(3):
        whole = tensors.pop(f"model.layers.{block}.mlp.up_proj.weight")
        for shard, rows in enumerate(whole.chunk(2)):
            tensors[f"model.layers.{block}.mlp.up_{shard}.weight"] = rows
    shards = ["mlp.up_0.weight", "mlp.up_1.weight"]
    with_converters(
        monkeypatch, WeightConverter(shards, "mlp.up_proj.weight", [Concatenate(dim=0)])
    )
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.up_0\.weight"):
        found_in(model, tensors)


def test_a_conversion_is_traced_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(conversion: Any, *args: Any) -> Any:
        calls.append(conversion.target)
        return trace(conversion, *args)

    trace = layout_tracing._trace
    monkeypatch.setattr(layout_tracing, "_trace", counted)
    model = tiny_model("mixtral")
    found_in(model, stored_from_memory(model))
    assert [name.rpartition(".")[2] for name in calls] == ["gate_up_proj", "down_proj"]


def test_one_stored_tensor_at_a_time_is_in_memory() -> None:
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    stored = found_in(model, tensors)
    alive: list[Any] = []

    def read(name: str) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = tensors[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    stored.assemble("model.layers.0.mlp.experts.gate_up_proj", read)
    assert len(alive) == 8


def test_stale_and_unknown_tensors_are_unused() -> None:
    model = tiny_model("llama")
    unknown = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.bias": torch.ones(4),
        "model.layers.3.eh_proj.weight": torch.ones(4),
    }
    stored = found_in(model, stored_from_memory(model) | unknown)
    assert set(stored.unused) == set(unknown)
    assert set(stored.stale) == set(list(unknown)[:2])


def test_damaged_checkpoints_are_refused() -> None:
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    missing = {name: tensor for name, tensor in tensors.items() if name != expert}
    with pytest.raises(CheckpointError, match=f"lacks the tensor {expert}"):
        found_in(model, missing)
    with pytest.raises(CheckpointError, match=rf"{expert} of shape \[7, 32\].* asks for \["):
        found_in(model, tensors | {expert: tensors[expert][:7]})
    norm = "model.layers.1.input_layernorm.weight"
    without_norm = {name: tensor for name, tensor in tensors.items() if name != norm}
    stored = found_in(model, without_norm)
    assert set(stored.faults) == {norm}
    assert stored.sources(norm) == ()
    with pytest.raises(CheckpointError, match=f"here lacks the tensor {norm}"):
        stored.check_complete("here")
