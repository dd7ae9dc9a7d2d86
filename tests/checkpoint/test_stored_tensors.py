"""Stored tensors and parameters in memory: every one accounted for, in both directions."""

import copy
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    WeightConverter,
    revert_weight_conversion,
)

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Unit
from cfsp.checkpoint.conversion import saved_state, stored_from_memory
from cfsp.checkpoint.reading import (
    Checkpoint,
    LoadedModel,
    channel_parameters,
    down_matrix,
    parameters_with_down,
    read_ffn_weights,
)
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import FileTensor, MadeTensor, TensorSpec, read_tensor_file
from cfsp.errors import CheckpointError, UnsupportedModelError
from tiny_decoders import model_class, tiny_config, tiny_model

# Of each kind one: plain names and other ones, experts side by side, fused, transposed and
# interleaved ones, dense FFNs beside them, multimodal models.
TYPES = (
    "llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoehybrid", "jamba",
    "phi3", "gemma3", "qwen2_5_vl", "aria", "inkling_mm_model", "kimi_k25", "minimax_m3_vl",
    "qwen3_vl_moe", "sarvam_moe",
)  # fmt: skip


class Saved:
    """A model, the file that it was saved to, and what cfsp makes of that."""

    def __init__(self, model_type: str, directory: Path) -> None:
        self.directory = directory
        self.model: Any = tiny_model(model_type)
        self.model.save_pretrained(directory)
        self.file = read_tensor_file(directory / "model.safetensors")
        with init_empty_weights(include_buffers=False):
            self.empty: Any = model_class(model_type)._from_config(tiny_config(model_type))
        self.architecture = find_architecture(self.empty)
        self.stored = StoredTensors.of(self.empty, self.architecture, self.file)


@pytest.fixture(scope="module", params=TYPES)
def saved(request, tmp_path_factory):
    return Saved(request.param, tmp_path_factory.mktemp(request.param))


def test_every_tensor_is_accounted_for(saved):
    stored, state = saved.stored, saved.model.state_dict()
    for name, value in state.items():
        name = stored.tied.get(name, name)
        assert torch.equal(stored.assemble(name), value), name
    assert {source for name in state for source in stored.sources(name)} == set(saved.file)
    assert stored.unused == () and stored.tensors == saved.file


def test_memory_is_seen_as_it_would_be_stored(saved):
    for model in (saved.model, type(saved.model).from_pretrained(saved.directory)):
        tensors = stored_from_memory(model)
        assert set(tensors) == set(saved.file)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved.file[name].read()), name
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for name in channel_parameters(saved.architecture):
        if saved.stored._made_by[name].placed is None:
            continue
        for source in saved.stored.sources(name):
            assert tensors[source].untyped_storage().data_ptr() in own, source


def test_what_is_cut_is_stored_as_transformers_would_save_it(saved):
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(saved.model)
    whole = saved.model.state_dict()
    cut = dict(whole)
    for name, (index, path) in channel_parameters(saved.architecture).items():
        unit = saved.architecture.units[index]
        kept = [
            sorted(torch.randperm(unit.width, generator=generator)[: unit.width * 2 // 3].tolist())
            for _ in range(unit.ffns)
        ]
        cut[name] = unit.select(path, whole[name], kept)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(cut[name]))
    expected = revert_weight_conversion(model, saved_state(model))
    for conversion in set(saved.stored._made_by.values()):
        of_these = {name: cut[name] for name in conversion.made}
        for stored, value in conversion.revert(of_these, saved.model.config).items():
            assert torch.equal(expected.pop(stored), value), stored
    assert not expected


def channel_in_memory(
    model: PreTrainedModel, unit: Unit, prefix: str, role: str, ffn: int
) -> Tensor:
    """Return what a matrix of one FFN has of the last channel; of two in one, first the gate."""
    name = getattr(unit, role)
    chosen = unit.select(name, model.get_parameter(prefix + name), [[unit.width - 1]] * unit.ffns)
    chosen = chosen[ffn] if unit.routed else chosen
    return chosen.movedim(unit.axes[name].axis - unit.routed, 0).flatten()


def test_matrices_are_read_and_written(saved):
    source = LoadedModel(saved.model)
    hidden = saved.model.config.get_text_config().hidden_size
    for unit in source.units:
        prefix = source.architecture.block_prefix(unit.block)
        downs = [down_matrix(source, unit, ffn) for ffn in range(unit.ffns)]
        for ffn, down in enumerate(downs):
            _, up, gate = read_ffn_weights(source, unit, ffn)
            assert up is not None
            assert up.shape == (unit.width, hidden) and down.shape == (hidden, unit.width)
            found = {"up": up[-1], "down": down[:, -1]}
            if gate is None:
                assert unit.gate is None
            elif unit.gate == unit.up:
                found["up"] = torch.cat([gate[-1], up[-1]])
            else:
                found["gate"] = gate[-1]
            for role, values in found.items():
                expected = channel_in_memory(saved.model, unit, prefix, role, ffn)
                assert torch.equal(values, expected), role
        narrow = {ffn: down[:, ::2] for ffn, down in enumerate(downs)}
        ((name, parameter),) = parameters_with_down(source, unit, narrow).items()
        every_second = [list(range(0, unit.width, 2))] * unit.ffns
        whole = saved.model.get_parameter(name)
        assert parameter.is_contiguous()
        assert torch.equal(parameter, unit.select(unit.down, whole, every_second))


def found_in(model: PreTrainedModel, tensors: dict[str, Tensor]) -> StoredTensors:
    made = {name: MadeTensor.of(tensor) for name, tensor in tensors.items()}
    return StoredTensors.of(model, find_architecture(model), made)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_checkpoint_of_the_base_model_lacks_a_prefix(model_type, tmp_path):
    """Such are GPT-2's on the hub: names without the base model's, and causal masks stored."""
    model = tiny_model(model_type, tie_word_embeddings=True)
    for place, each in (("whole", model), ("base", model.base_model)):
        each.save_pretrained(tmp_path / place)
    weights = tmp_path / "base" / "model.safetensors"
    stale = {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()} if model_type == "gpt2" else {}
    stored = {**load_file(weights), **stale}
    save_file(stored, weights, metadata={"format": "pt"})
    found, expected = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "whole")
    assert stored.keys().isdisjoint(expected.specs)
    assert found.specs == expected.specs
    assert all(torch.equal(found.read(name), expected.read(name)) for name in found.specs)
    for name, value in model.state_dict().items():
        assert torch.equal(found.parameter(name), value)


def test_experts_that_the_hub_has_transposed_stay_so():
    model = tiny_model("qwen3_vl_moe")
    old = {
        name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in stored_from_memory(model).items()
    }
    stored = found_in(model, old)
    for name, value in model.state_dict().items():
        assert torch.equal(stored.assemble(name), value)
        for tensor, again in stored._made_by[name].revert({name: value}, model.config).items():
            assert torch.equal(again, old[tensor])


def with_converters(monkeypatch: pytest.MonkeyPatch, *converters: WeightConverter) -> None:
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda model: list(converters)
    )


@pytest.mark.parametrize("up_first", [False, True])
def test_one_stored_tensor_becomes_gate_and_up(monkeypatch, up_first):
    """Row about row is inkling_mm_model."""
    model = tiny_model("llama")
    tensors = stored_from_memory(model)
    targets = [f"mlp.{part}_proj.weight" for part in ("gate", "up")][:: -1 if up_first else 1]
    for block in range(3):
        parts = [tensors.pop(f"model.layers.{block}.{target}") for target in targets]
        tensors[f"model.layers.{block}.mlp.fused.weight"] = torch.cat(parts)
    with_converters(monkeypatch, WeightConverter("mlp.fused.weight", targets, [Chunk(dim=0)]))
    stored = found_in(model, tensors)
    for name, value in model.state_dict().items():
        assert torch.equal(stored.assemble(name), value)
    names = [f"model.layers.1.{target}" for target in targets]
    conversion = stored._made_by[names[0]]
    assert set(conversion.made) == set(names)
    cut = {name: model.get_parameter(name)[[5, 8, 90]] for name in names}
    (found,) = conversion.revert(cut, model.config).items()
    assert found[0] == "model.layers.1.mlp.fused.weight"
    assert torch.equal(found[1], torch.cat(list(cut.values())))


def test_what_cannot_be_stored_again_is_refused(monkeypatch):
    model = tiny_model("llama")
    tensors = stored_from_memory(model)
    for block in range(3):
        whole = tensors.pop(f"model.layers.{block}.mlp.up_proj.weight")
        for shard, rows in enumerate((whole[:40], whole[40:])):
            tensors[f"model.layers.{block}.mlp.up_{shard}.weight"] = rows
    shards = ["mlp.up_0.weight", "mlp.up_1.weight"]
    joined = WeightConverter(shards, "mlp.up_proj.weight", [Concatenate(dim=0)])
    with_converters(monkeypatch, joined)
    said = r"model\.layers\.0\.mlp\.up_proj\.weight, made of .*up_0\.weight, cannot be stored again"
    with pytest.raises(UnsupportedModelError, match=said):
        found_in(model, tensors)


def test_an_expert_of_another_dtype_is_refused_in_any_block():
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[expert] = tensors[expert].bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\..* cannot be stored again"):
        found_in(model, tensors)


@pytest.mark.parametrize(("expert", "count"), [(None, 8), (2, 2)])
def test_one_stored_tensor_at_a_time_is_in_memory(expert, count):
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    alive: list[Any] = []

    def read(name: str) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = tensors[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    made = {n: MadeTensor(TensorSpec.of(each), partial(read, n)) for n, each in tensors.items()}
    stored = StoredTensors.of(model, find_architecture(model), made)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = stored.assemble(name, expert=expert)
    whole = model.get_parameter(name)
    assert torch.equal(found, whole if expert is None else whole[expert])
    assert len(alive) == count


def test_one_expert_of_a_stack_is_read_alone(tmp_path, noted):
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    source, name = Checkpoint(tmp_path), "model.layers.0.mlp.experts.down_proj"
    whole = source.parameter(name)
    counts = noted(FileTensor, "read_part", lambda _, start, stop: stop - start)
    assert torch.equal(source.parameter(name, expert=2), whole[2])
    assert counts == [whole[2].numel()]


def test_stale_tensors_are_left_out_and_unknown_ones_unused():
    model = tiny_model("llama")
    unknown = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.bias": torch.ones(4),
        "model.layers.3.eh_proj.weight": torch.ones(4),
    }
    stored = found_in(model, stored_from_memory(model) | unknown)
    assert stored.unused == ("model.layers.3.eh_proj.weight",)
    known = set(stored_from_memory(model))
    assert stored.tensors.keys() == known | set(stored.unused)


def test_damaged_checkpoints_are_refused():
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    missing = {name: tensor for name, tensor in tensors.items() if name != expert}
    for damaged in (missing, tensors | {expert: tensors[expert][:7]}):
        with pytest.raises(CheckpointError, match=r"no tensors that .*gate_up_proj can be made of"):
            found_in(model, damaged)
    fewer = tiny_model("mixtral", num_local_experts=3)  # than are stored
    with pytest.raises(CheckpointError, match=r"of shape \[4, .* asks for \[3, "):
        found_in(fewer, tensors)
    norm = "model.layers.1.input_layernorm.weight"
    with pytest.raises(CheckpointError, match=f"lacks the tensor {norm}; download or save it"):
        found_in(model, {name: tensors[name] for name in tensors if name != norm})


def test_a_model_without_a_head_is_not_to_be_downloaded_again_only():
    """E5-Mistral and other models of embeddings are stored as what lies below a head."""
    model = tiny_model("mixtral")
    tensors = stored_from_memory(model)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, its head \(models of embedd"):
        found_in(model, tensors)
