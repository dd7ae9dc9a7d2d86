"""Surgery: shards in and out, byte-for-byte copies, nothing half-written; in memory the same."""

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, set_seed

import cfsp
from builders import edit_tensors, entries, never, plan_keeping, plan_without, raising, read_json
from cfsp.checkpoint import output
from cfsp.checkpoint.loading import torch_as_it_starts
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.checkpoint.reading import Checkpoint, channel_parameters
from cfsp.checkpoint.tensor_file import FileTensor, specs_of, write_shards
from cfsp.cli.inspect import inspect_checkpoint
from cfsp.cut.surgery import PrunedSource
from cfsp.errors import CheckpointError, OutputError
from cfsp.planning.candidate import Dropped
from cfsp.planning.make import model_size
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model

# The first block keeps four channels, the second all, the third every other.
KEPT = ((0, 5, 7, 95), tuple(range(96)), tuple(range(1, 96, 2)))


@pytest.mark.parametrize(
    ("dtype", "sharded_source", "limit"),
    [
        (torch.float32, False, 10**9),
        (torch.float16, False, 20_000),
        (torch.bfloat16, True, 10**9),
        (torch.bfloat16, True, 20_000),
    ],
)
def test_shards_in_and_out(tmp_path, dtype, sharded_source, limit):
    size, out = "20KB" if sharded_source else "1GB", tmp_path / "out"
    model = build_tiny_model("llama-biased", dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size=size)
    source = Checkpoint(tmp_path / "source")
    pruned = PrunedSource(source, plan_keeping(source, KEPT, Dropped()))
    out.mkdir()
    written = write_shards(out, pruned.outgoing(), limit)
    files = {name: load_file(out / name) for name in written}
    after = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert sum(map(len, files.values())) == len(after)
    assert specs_of(after) == pruned.specs and after.keys() == source.specs.keys()
    channels = channel_parameters(source.architecture)
    for name, tensor in after.items():
        expected = source.read(name)
        if name in channels:
            index, path = channels[name]
            axis = source.units[index].axes[path].axis
            expected = expected.index_select(axis, torch.tensor(KEPT[index]))
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
    if limit == 10**9:
        assert entries(out) == {"model.safetensors"}
        return
    index = read_json(out / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert index["weight_map"] == {name: file for file, its in files.items() for name in its}
    assert entries(out) == {*files, "model.safetensors.index.json"} and len(files) > 2
    # Only a tensor that is larger than a shard may make one larger.
    for tensors in files.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit


def test_what_is_stored_behind_the_last_block_goes_with_a_block(tmp_path):
    """The config says from which number on the layers are that predict more tokens."""
    tiny_model("deepseek_v3", num_nextn_predict_layers=1).save_pretrained(tmp_path)
    # 61 is that of the published model, 3 what this one's config says.
    behind = [f"model.layers.{number}.eh_proj.weight" for number in (61, 3)]
    extra = {name: torch.ones(4, 2) for name in (*behind, "mtp.fc.weight")}
    edit_tensors(tmp_path / "model.safetensors", lambda found: found.update(extra))
    source = Checkpoint(tmp_path)
    plans = [plan_without(source, Dropped(blocks)) for blocks in ((), (2,))]
    kept, cut = (PrunedSource(source, plan) for plan in plans)
    assert extra.keys() <= kept.specs.keys()
    assert extra.keys() & cut.specs.keys() == {"mtp.fc.weight"}
    assert [each.config.num_nextn_predict_layers for each in (kept, cut)] == [1, 0]
    assert model_size(source, dropped=Dropped((2,))).parameters == cut.parameter_count


# Whole or not at all.


def test_failure_in_the_middle_of_surgery_leaves_nothing(model, few, tmp_path, monkeypatch):
    read, served = FileTensor.chunks, []

    def failing(self: FileTensor) -> Any:
        served.append(self.name)
        if len(served) == 5:
            raise CheckpointError("the source ended")
        return read(self)

    monkeypatch.setattr(FileTensor, "chunks", failing)
    with pytest.raises(CheckpointError, match="the source ended"):
        cfsp.prune(model, out=tmp_path / "out", sparsity=0.4, **few)
    assert len(served) == 5
    assert entries(tmp_path) == set()
    # Then an empty directory is there, and is used.
    (tmp_path / "out").mkdir()
    cfsp.prune(model, out=tmp_path / "out", sparsity=0.4, **few)
    assert (tmp_path / "out" / "config.json").is_file()
    assert entries(tmp_path) == {"out"}


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "plan.json"
    write_atomically(path, b"first")
    monkeypatch.setattr(output.os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert entries(path.parent) == {"plan.json"}


# A model that was pruned in memory and saved by transformers: the directory that cfsp writes.


# Of transformers, or of models in memory only.
_THEIRS = {"transformers_version", "dtype", "cfsp", "_name_or_path"}


@pytest.mark.parametrize(("name", "block_metric"), [("llama", "angular"), ("gpt2", "uniform")])
def test_save_pretrained_writes_what_prune_writes(
    tiny_checkpoint, tokenizer, few, tmp_path, name, block_metric
):
    asked = {"sparsity": 0.5, "multiple": 8, "block_metric": block_metric, "repair": "none", **few}
    memory, files = (tmp_path / place for place in ("memory", "files"))
    cfsp.prune(tiny_checkpoint(name), out=files, **asked)
    model = cfsp.load(tiny_checkpoint(name))
    cfsp.prune(model, tokenizer, **asked).save_pretrained(memory)

    config, expected = (read_json(at / "config.json") for at in (memory, files))
    for key in expected.keys() - _THEIRS - {"per_layer_config"}:
        assert config[key] == expected[key], key
    # transformers leaves out the blocks that are as wide as the widest.
    assert ("per_layer_config" in config) is ("per_layer_config" in expected)
    widths = [Checkpoint(at).architecture.widths for at in (memory, files)]
    assert widths[0] == widths[1]
    assert config.get("auto_map") == expected.get("auto_map")
    if "auto_map" in expected:
        assert set(config["auto_map"]) == {"AutoModel", "AutoModelForCausalLM"}
        assert (memory / MODELING_FILE).read_bytes() == (files / MODELING_FILE).read_bytes()
        base = AutoModel.from_pretrained(memory, trust_remote_code=True)
        assert type(base).__name__.startswith("Pruned")

    told, known = (inspect_checkpoint(Checkpoint(at))["pruned"] for at in (memory, files))
    for key in known.keys() - {"command", "created"}:
        assert told[key] == known[key], key
    # Pruned again, it says nothing of the first time.
    tokenizer.save_pretrained(memory)
    cfsp.prune(memory, out=tmp_path / "again", **asked)
    assert "cfsp" not in read_json(tmp_path / "again" / "config.json")


def test_a_head_that_is_no_longer_the_embedding_stays_its_own(tokenizer, few, tmp_path):
    model: Any = build_tiny_model("qwen2")
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    pruned = cfsp.prune(model, tokenizer, sparsity=0.5, repair="none", **few)
    pruned.save_pretrained(tmp_path / "saved")
    for each in (pruned, cfsp.load(tmp_path / "saved")):
        assert torch.equal(each.lm_head.weight, model.lm_head.weight)
        assert torch.equal(each.get_input_embeddings().weight, model.model.embed_tokens.weight)


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def _narrowed(model: Any) -> Any:
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight[:50])
    return model


def test_what_only_has_a_config_is_no_model(tokenizer, text_file):
    config = build_tiny_model("llama").config
    given: Any
    linear: Any = torch.nn.Linear(2, 2)
    linear.config = {"hidden_size": 2}
    for given in (SimpleNamespace(config=config), linear):
        said = f"expected a path or a transformers model, found a {type(given).__name__}"
        with pytest.raises(CheckpointError, match=said):
            cfsp.prune(given, tokenizer, sparsity=0.5, data=[text_file])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_narrowed, r"1.mlp.up_proj.weight of shape \[50, 32\], its config asks for \[96, 32\]"),
        (_with_lora, r"has model.layers.0.self_attn.q_proj.base_layer.weight.*adapters merged"),
        (lambda model: model.model, r"has embed_tokens.weight.*the whole causal model"),
        (lambda model: model.to("meta"), r"has no values there.*give its path"),
    ],
)
def test_a_model_in_memory_unlike_its_class_is_refused(tokenizer, text_file, changed, message):
    with pytest.raises(CheckpointError, match=message):
        cfsp.prune(changed(build_tiny_model("llama")), tokenizer, sparsity=0.5, data=[text_file])


@pytest.fixture(scope="module")
def usual(tokenizer, few) -> Any:
    """The tiny Llama without half of its channels."""
    return cfsp.prune(build_tiny_model("llama"), tokenizer, sparsity=0.5, multiple=8, **few)


def test_a_compiled_model_with_hooks_in_training_mode_is_measured_as_if_loaded(
    usual, tokenizer, few
):
    model: Any = build_tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    measured = cfsp.calibrate(model, tokenizer, **few)

    model.train()
    shown: list[Any] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: shown.append(0))
        block.register_forward_pre_hook(lambda *_: shown.append(0))
    frozen = model.model.layers[1].mlp.eval()
    model._compiled_call_impl = never  # as compile() sets it
    modes = [module.training for module in model.modules()]
    again = cfsp.calibrate(model, tokenizer, **few)
    assert again.sensitivity == measured.sensitivity
    same = cfsp.prune(model, tokenizer, sparsity=0.5, multiple=8, **few)
    assert same.config.to_dict() | {"cfsp": 0} == usual.config.to_dict() | {"cfsp": 0}
    assert not same.training
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert model._compiled_call_impl is never and frozen._compiled_call_impl is None
    for mistake in ({"sparsity": 0.5, "data": ["missing.txt"]}, {"sparsity": 0.99999}):
        with pytest.raises(cfsp.CfspError):
            cfsp.prune(model, tokenizer, **few | mistake)
    assert [module.training for module in model.modules()] == modes
    assert not shown
    model._compiled_call_impl = None
    model(torch.arange(8)[None])
    assert len(shown) == 2 * len(model.model.layers)


def test_what_the_code_around_a_call_set_is_not_computed_with(usual, tokenizer, few):
    model: Any = build_tiny_model("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            same = cfsp.prune(model, tokenizer, sparsity=0.5, multiple=8, **few)
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.get_default_device().type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in usual.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, rtol=0, atol=0)
    same(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()  # it can be trained


@pytest.mark.parametrize("asked", ["medium", "highest"])
def test_float32_is_multiplied_in_float32_whatever_the_code_around_a_call_asked_for(asked):
    matmuls: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    torch.set_float32_matmul_precision(asked)
    before = [each.fp32_precision for each in matmuls]
    try:
        with torch_as_it_starts():
            assert [each.fp32_precision for each in matmuls] == ["ieee", "ieee"]
        assert [each.fp32_precision for each in matmuls] == before
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_model_is_loaded_and_exported_wherever_torch_makes_tensors(model, tmp_path, monkeypatch):
    monkeypatch.setattr("cfsp.checkpoint.skeleton._proved", {})
    with torch.device("meta"):
        assert cfsp.load(model).device.type == "cpu"
        cfsp.export(model, "vllm", tmp_path / "out")


def test_threads_take_turns(caplog):
    """Else the one would be given the default device of the other, and the process keep it."""
    seen = []

    def call() -> None:
        with torch_as_it_starts():
            seen.append("begins")
            time.sleep(0.02)
            seen.append("ends")

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["begins", "ends"] * 3
    assert "waits until that ends" in caplog.text


def test_a_call_leaves_the_random_state_alone():
    def draw() -> list[float]:
        return [random.random(), np.random.random(), float(torch.rand(1))]

    set_seed(1)
    expected = draw()
    set_seed(1)
    with pytest.raises(ZeroDivisionError), torch_as_it_starts():
        set_seed(2)  # as the Trainer does
        _ = 1 / 0
    assert draw() == expected


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("is_used", [True, False])
def test_a_call_leaves_the_random_state_of_accelerators_alone(kind, is_used, monkeypatch):
    """One that nobody has used yet begins with the seed of the CPU, and is not asked for more."""
    left: list[Any] = []
    backend = {
        "is_initialized": lambda: is_used,
        "get_rng_state_all": lambda: ["its state"] if is_used else never(),
        "set_rng_state_all": left.append,
        "manual_seed_all": left.append,
    }
    set_seed(1)
    for name, function in backend.items():
        monkeypatch.setattr(f"torch.{kind}.{name}", function)
    with torch_as_it_starts():
        torch.manual_seed(2)
    assert left[-1] == (["its state"] if is_used else 1)


@pytest.mark.parametrize("effort", [{}, {"effort": "best"}], ids=str)
def test_a_model_that_was_made_in_inference_mode(effort, tokenizer, few):
    with torch.inference_mode():
        model: Any = build_tiny_model("llama")
        pruned = cfsp.prune(model, tokenizer, sparsity=0.5, multiple=8, **effort, **few)
        assert model.lm_head.weight.is_inference()
    pruned(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()


def test_what_was_pruned_in_memory_has_not_the_name_of_its_original(model, tokenizer, few):
    asked = {"sparsity": 0.25, "multiple": 8, "repair": "none", **few}
    once = cfsp.prune(cfsp.load(model), tokenizer, **asked)
    again = cfsp.prune(once, tokenizer, **asked)
    assert once.config.cfsp["base_model"]["name"] == str(model)
    assert again.config.cfsp["base_model"]["name"] == type(once).__name__


def test_what_was_pruned_by_its_path_is_known_as_pruned_in_memory(
    pruned, model, text_file, tokenizer, few
):
    """So recovery is taught by the first model of all, and a card names all texts."""
    asked = {"sparsity": 0.25, "multiple": 8, "repair": "none", **few}
    told = cfsp.prune(cfsp.load(pruned), tokenizer, **asked).config.cfsp["base_model"]
    assert told["made_from"]["name"] == str(model)
    assert told["texts"] == [str(text_file)]
