"""benchmarks/quantisers.py: what each library loses, for those that are installed."""

import json
import sys

import pytest

import quantisers
from ragged import cut, tiny

# What a method imports; the extras of cfsp bring llama_cpp_py_sync only.
LIBRARIES = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "llm": "llmcompressor",
    "openvino": "nncf",
    "gguf": "llama_cpp_py_sync",
}


@pytest.mark.parametrize("method", quantisers.METHODS)
def test_a_pruned_model_is_quantised_as_a_dense_one(tmp_path, tokenizer, monkeypatch, method):
    library = LIBRARIES[method.partition("-")[0]]
    pytest.importorskip(library, reason=f"{library} is not installed; see docs/quantise.md")
    # Rows of multiples of 128, which groups of 128 weights want.
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    pruned = cut(model, tokenizer, tmp_path, (128, 128, 128))
    text = tmp_path / "text.txt"
    text.write_text("A text of some words, which is read again and again. " * 40)
    argv, out = ["quantisers", tmp_path / "dense", pruned.directory], tmp_path / "losses.json"
    argv += ["--method", method, "--data", text, "--seqlen", 64, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    assert quantisers.main() == 0
    dense, after = json.loads(out.read_text())["losses"]
    assert after["nbytes"] < dense["nbytes"]
    for loss in (dense, after):
        # A random model, whose predictions 4 bits change a lot.
        assert 0 < loss["divergence"] < 2
        assert loss["generated"]
