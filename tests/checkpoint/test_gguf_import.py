"""Reading a .gguf file: what is said, what is kept and where, and a head that is the embedding."""

import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import cfsp
from builders import entries, raising, random_tokens
from cfsp.checkpoint import gguf_import
from cfsp.checkpoint.gguf_import import import_gguf
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CheckpointError, OutputError
from cfsp.exports import gguf
from cfsp.exports.gguf import write
from cfsp.text.tokenizers import load_tokenizer
from ragged import LINEAR, LLAMA3, YARN, tiny
from tiny_models import build_tiny_model

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
pytestmark = pytest.mark.usefixtures("own_cache", "splits_here")


@pytest.fixture
def make_gguf(tmp_path, tokenizer):
    """Give a file of a tiny Qwen2 whose head is the embedding times 1 and a bit of noise."""

    def make(noise: float, kind: str = "f32") -> Path:
        model = tiny("qwen2", tie_word_embeddings=False)
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            apart = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
            model.get_output_embeddings().weight.copy_(embedding * (1 + noise * apart))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        path = tmp_path / "tiny.gguf"
        write(Checkpoint(tmp_path / "model"), path, kind)
        return path

    return make


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what cfsp said; the package gguf has warnings of its own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("cfsp.")]


def test_it_says_what_it_does_and_where_the_result_is(make_gguf, caplog):
    path = make_gguf(1.0)
    caplog.set_level(logging.INFO, "cfsp")
    directory = import_gguf(path)
    before, after = messages(caplog)
    assert before.startswith("converting tiny.gguf (0.00 GB) to safetensors")
    assert f"GB in {directory}; without that it is converted again" in after
    caplog.clear()
    assert import_gguf(path) == directory
    assert not messages(caplog)


@pytest.mark.parametrize(
    ("noise", "kind", "bits", "said"),
    [
        (0.004, "f32", None, ["0.4% apart"]),
        (0.04, "f32", None, []),
        (0.005, "q8_0", None, ["0.9% apart"]),
        (0.04, "q8_0", None, []),
        (0.04, "f32", 4.5, ["4.0% apart"]),
    ],
)
def test_a_head_that_is_the_embedding_but_for_rounding_is_tied_again(
    make_gguf, caplog, monkeypatch, noise, kind, bits, said
):
    """A head that moved further than its type rounds was trained, as by a fine-tune."""
    if bits:
        tensors = dict.fromkeys(("token_embd.weight", "output.weight"), bits)
        monkeypatch.setattr("cfsp.checkpoint.gguf_import._bits_per_weight", lambda reader: tensors)
    path = make_gguf(noise, kind)
    caplog.set_level(logging.INFO, "cfsp")
    checkpoint = Checkpoint(import_gguf(path))
    assert checkpoint.config.tie_word_embeddings == bool(said)
    assert ("lm_head.weight" in checkpoint.specs) != bool(said)
    notes = [message for message in messages(caplog) if "tied" in message]
    assert re.findall(r"[.\d]+% apart", " ".join(notes)) == said


def test_the_more_precise_copy_stays(make_gguf, monkeypatch):
    bits = {"token_embd.weight": 5, "output.weight": 8}
    monkeypatch.setattr("cfsp.checkpoint.gguf_import._bits_per_weight", lambda reader: bits)
    path = make_gguf(0.04)
    head = Checkpoint(path.parent / "model").read("lm_head.weight")
    found = Checkpoint(import_gguf(path)).read("model.embed_tokens.weight")
    assert torch.equal(found, head)


CHANGES = {
    "qwen2": {"sliding_window": None, "use_sliding_window": False},
    "qwen3": {"head_dim": 8},
}


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", LINEAR),
        ("llama", LLAMA3),
        ("llama-biased", {"rope_theta": 50_000.0}),
        ("qwen2", YARN | {"attention_factor": 1.5}),
    ],
)
def test_positions_and_biases_come_back(tmp_path, tokenizer, name, rope):
    """Of a file in float32 no bit is lost."""
    model = build_tiny_model(name, **CHANGES.get(name, {}))
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(Checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    found = cfsp.load(import_gguf(tmp_path / "m.gguf"))
    tokens_BT = random_tokens(1, 60)
    with torch.inference_mode():
        expected = cfsp.load(tmp_path / "model")(input_ids=tokens_BT).logits
        assert torch.allclose(found(input_ids=tokens_BT).logits, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "caps"), [("gemma2", (2.0, 3.0)), ("gemma3_text", (None, None))])
def test_scales_of_attention_come_back(tmp_path, tokenizer, monkeypatch, name, caps):
    """transformers reads neither by what queries are divided, nor at what logits are capped."""
    monkeypatch.setattr(gguf_import, "_warn_of_other_tokens", lambda *_: None)  # no Gemma's
    said = dict(zip(("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True))
    build_tiny_model(name, head_dim=8, query_pre_attn_scalar=8, **said).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write(Checkpoint(tmp_path), tmp_path / "m.gguf", "f32")
    found, tokens_BT = cfsp.load(import_gguf(tmp_path / "m.gguf")), random_tokens(1, 16)
    with torch.inference_mode():
        expected = cfsp.load(tmp_path)(input_ids=tokens_BT).logits
        assert torch.allclose(found(input_ids=tokens_BT).logits, expected, atol=1e-5)


def test_positions_that_no_config_says_are_refused(make_gguf, monkeypatch):
    path = make_gguf(1.0)
    said = {"scaling.type": "longrope"}
    monkeypatch.setattr("cfsp.checkpoint.gguf_rope._said", lambda reader: said)
    with pytest.raises(CheckpointError, match=r"positions are scaled by longrope\); use the safet"):
        import_gguf(path)


def test_a_tokenizer_that_cannot_split_is_told(make_gguf, monkeypatch):
    path = make_gguf(1.0)
    error = Exception("Unk token `None` not found in the vocabulary")
    monkeypatch.setattr("cfsp.checkpoint.gguf_import.tokens_differ", raising(error))
    with pytest.raises(CheckpointError, match=r"cannot read .*Unk token.*; use the safetensors"):
        import_gguf(path)


def test_where_there_is_no_room_another_place_is_asked_for(make_gguf, monkeypatch):
    path = make_gguf(1.0)
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", raising(error))
    with pytest.raises(OutputError, match="set CFSP_CACHE to a directory that can be"):
        import_gguf(path)


def test_a_file_is_converted_once_however_many_open_it(make_gguf, monkeypatch):
    path, begun, real = make_gguf(1.0), [], gguf_import._convert

    def convert(*given: Any) -> None:
        begun.append(given)
        time.sleep(0.2)  # the other one has come meanwhile
        real(*given)

    monkeypatch.setattr(gguf_import, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(import_gguf, (path, path))
    assert first == second and len(begun) == 1
    assert entries(first.parent) == {first.name}


def test_a_variable_of_a_cache_that_is_empty_is_as_if_it_was_not_set(monkeypatch):
    for name in ("CFSP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert gguf_import._converted_directory() == Path.home() / ".cache" / "cfsp" / "gguf"


def test_a_user_without_a_home_names_the_cache(tmp_path, monkeypatch):
    """As in a container, whose users have no entry and no HOME."""
    none = RuntimeError("Could not determine home directory.")
    monkeypatch.setattr("pathlib.Path.home", raising(none))
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path))
    assert gguf_import._converted_directory() == tmp_path / "gguf"
    for name in ("CFSP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OutputError, match="no home directory; set CFSP_CACHE to a directory"):
        gguf_import._converted_directory()


def test_a_tokenizer_beside_a_file_is_not_of_it(tmp_path, tokenizer):
    """As that of another model, in a folder of downloads."""
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(Checkpoint(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    other = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens = other["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    found = load_tokenizer(import_gguf(tmp_path / "m.gguf"))
    assert found("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_a_file_that_lacks_tensors_is_refused(make_gguf):
    path = make_gguf(1.0)
    data, name = path.read_bytes(), b"blk.2.ffn_down.weight"
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, b"blk.9.ffn_down.weight"))
    with pytest.raises(CheckpointError, match=r"it lacks 1 of the model's tensors, as model\."):
        import_gguf(path)


def test_a_file_with_widths_of_its_own_is_refused(make_gguf, monkeypatch):
    """As `cfsp export --to gguf` makes them: transformers reads no such graph."""
    monkeypatch.setitem(gguf_import.ELSEWHERE, "qwen2", gguf_import.ELSEWHERE["deci"])
    said = r"for llama\.cpp alone \(its graph qwen2\); give the checkpoint that it was made of"
    with pytest.raises(CheckpointError, match=said):
        import_gguf(make_gguf(1.0))


def header(path: Path, said: dict[str, Any]) -> Path:
    """Write a file that says this beside one matrix."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for key, value in said.items():
        kind = GGUFValueType.get_type(value)
        of = GGUFValueType.get_type(value[0]) if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, of)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GRAPH, COUNT = "general.architecture", "split.count"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({GRAPH: "llama", COUNT: 2}, "is a part of 2; join them first: llama-gguf-split"),
        ({GRAPH: "llama", COUNT: "1"}, "has no split.count that can be read; download it again"),
        ({GRAPH: "llama", COUNT: [2]}, r"has no split\.count that can be read"),
        ({}, r"has no general\.architecture that can be read; download it again"),
        ({GRAPH: 5}, r"has no general\.architecture that can be read"),
    ],
)
def test_a_part_of_a_file_and_damage_are_refused(tmp_path, said, message):
    with pytest.raises(CheckpointError, match=message):
        import_gguf(header(tmp_path / "m.gguf", said))


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (32, r"layers\.0\.mlp\.down_proj\.weight is \(32, 96\) in it, \(32, 32\) by its header"),
        ([96, 32, 96], "says feed_forward_length block by block, as if widths differed"),
    ],
)
def test_other_widths_than_the_header_says_are_named(make_gguf, monkeypatch, width, message):
    real = gguf._fields
    widths = {"feed_forward_length": width}
    monkeypatch.setattr(gguf, "_fields", lambda *given: real(*given) | widths)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(make_gguf(1.0))


def test_a_llama_that_is_named_mistral_is_one(tmp_path, tokenizer, monkeypatch):
    """By this very name transformers takes another type, of which it then has no tensors."""
    real = gguf._fields
    monkeypatch.setattr(gguf, "_fields", lambda *given: real(*given) | {"name": "mistral"})
    tiny("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write(Checkpoint(tmp_path), tmp_path / "m.gguf", "f32")
    found = Checkpoint(import_gguf(tmp_path / "m.gguf"))
    assert found.config.model_type == "llama" and found.specs == Checkpoint(tmp_path).specs


def test_numbers_that_nobody_reads_are_told_of(make_gguf, monkeypatch, caplog):
    path = make_gguf(1.0)
    real = gguf_import.gguf_reader(path)
    more = [SimpleNamespace(name=name, n_elements=7) for name in ("blk.0.odd", "rope_x", "blk.3.x")]
    reader = SimpleNamespace(tensors=[*real.tensors, *more])
    gguf_import._warn_of_unread(cfsp.load(path.parent / "model"), path, reader)
    assert messages(caplog) == [
        "tiny.gguf holds 7 numbers that transformers does not read, so the model may compute "
        "something else: use the safetensors of the same model"
    ]


def test_a_file_may_have_any_name_and_an_adapter_beside(make_gguf):
    """Ollama keeps its files by their hashes. The adapter is not of it; its own head stays."""
    path = make_gguf(1.0)
    blob = path.rename(path.with_name("é" * 127))  # as long as a name can be
    assert Checkpoint(open_checkpoint(blob).directory).specs
    blob = blob.rename(path.with_name("sha256-3f1a"))
    (path.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
    found = open_checkpoint(blob)
    assert found.specs == Checkpoint(path.parent / "model").specs
    assert "lm_head.weight" in found.specs and not found.config.tie_word_embeddings


def test_what_transformers_says_against_a_file_is_told_in_one_line(make_gguf):
    """Ours for llama.cpp have architectures that transformers does not read, such as `deci`."""
    path = make_gguf(0.0)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"zwen2"))
    told = r"transformers cannot read \S+ \(ValueError: [^\n]{1,220}\); use the safetensors of"
    with pytest.raises(CheckpointError, match=told):
        import_gguf(path)
