"""Reading a .gguf file: what is said, what is kept and where, and a head that is the embedding."""

import logging
from pathlib import Path

import pytest
import torch

from cfsp.checkpoint.gguf_import import import_gguf
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CheckpointError
from cfsp.exports.gguf import write
from ragged import tiny

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path / "cache"))


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


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_head_that_is_the_embedding_is_tied_again(make_gguf, caplog, kind):
    path = make_gguf(0.04, kind)
    caplog.set_level(logging.INFO, "cfsp")
    checkpoint = Checkpoint(import_gguf(path))
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.specs
    (note,) = [message for message in messages(caplog) if "tied" in message]
    assert "4.0% apart" in note or "4.1% apart" in note


def test_the_more_precise_copy_stays(make_gguf, monkeypatch):
    bits = {"token_embd.weight": 5, "output.weight": 8}
    monkeypatch.setattr("cfsp.checkpoint.gguf_import._bits_per_weight", lambda reader: bits)
    path = make_gguf(0.04)
    head = Checkpoint(path.parent / "model").read("lm_head.weight")
    found = Checkpoint(import_gguf(path)).read("model.embed_tokens.weight")
    assert torch.equal(found, head)


def test_a_head_of_its_own_stays(make_gguf):
    checkpoint = Checkpoint(import_gguf(make_gguf(1.0)))
    assert not checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" in checkpoint.specs


def test_what_transformers_says_against_a_file_is_told_in_one_line(make_gguf):
    """Ours for llama.cpp have architectures that transformers does not read, such as `deci`."""
    path = make_gguf(0.0)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"zwen2"))
    told = r"transformers cannot read \S+ \(ValueError: [^\n]{1,220}\); use the safetensors of"
    with pytest.raises(CheckpointError, match=told):
        import_gguf(path)
