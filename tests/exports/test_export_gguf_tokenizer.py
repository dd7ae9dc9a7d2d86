"""GGUF's tokenizer: llama.cpp splits text as transformers does, whatever the kind of BPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from cfsp.errors import ExportError
from cfsp.exports.gguf_tokenizer import _PRE_TOKENIZERS
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.target import ExportOptions
from conftest import random_prose
from ragged import cut, tiny

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[export]'")
pytest.importorskip("llama_cpp_py_sync", reason="no llama.cpp: pip install '.[export]'")

TEXTS = [
    "It's 12345 o'clock; we'll see -- THEY'LL see!\n\n\n  def f(x):\n\treturn x**2 # 7",
    "naïve café, 北京 и Москва 😀   spaces   ",
    "a model prunes 2024 channels. the river runs under the stone",
]


def byte_level(name: str, more_text: str = "") -> PreTrainedTokenizerFast:
    steps = next(steps for steps, known in _PRE_TOKENIZERS.items() if known == name)
    made: list[Any] = []
    for step in steps:
        if step == "digits":
            made.append(pre.Digits(individual_digits=True))
        elif step != "gpt2":
            made.append(pre.Split(Regex(step), behavior="isolated"))
    made.append(pre.ByteLevel(add_prefix_space=False, use_regex="gpt2" in steps))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = made[0] if len(made) == 1 else pre.Sequence(made)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [random_prose(2000, seed=0), *TEXTS * 20, more_text],
        trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def sentencepiece_like(prefix: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the kind of Llama 2 and Mistral: byte fallback, no expression."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    # 310 entries: 259 of them fixed, and no piece may hold two words.
    core.pre_tokenizer = pre.Split(Regex("▁[^▁]*"), behavior="isolated")
    core.train_from_iterator(
        [random_prose(2000, seed=0)],
        trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False),
    )
    data = json.loads(core.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = data["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def check(tokenizer: PreTrainedTokenizerFast, directory: Path) -> dict[str, Any]:
    """Export a model with this tokenizer, compare tokens, and return the file's fields."""
    from gguf import GGUFReader

    from cfsp.exports.llama_cpp import LlamaCpp
    from cfsp.text.tokenizers import load_tokenizer

    source = cut(tiny("llama"), tokenizer, directory)
    export_checkpoint(source, "gguf", directory / "m.gguf")
    loaded = load_tokenizer(source.directory)
    with LlamaCpp(directory / "m.gguf") as llama:
        for text in TEXTS:
            assert llama.tokenize(text) == list(loaded(text)["input_ids"]), text
    return {n: f.contents() for n, f in GGUFReader(directory / "m.gguf").fields.items()}


@pytest.mark.parametrize("name", sorted(_PRE_TOKENIZERS.values()))
def test_byte_level(tmp_path: Path, name: str) -> None:
    fields = check(byte_level(name), tmp_path)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == name
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert fields["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    fields = check(sentencepiece_like(prefix), tmp_path)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_special_tokens_and_chat_template(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level("gpt-2")
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fields = check(tokenizer, tmp_path)
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.padding_token_id"] == 310
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.token_type"][0] == 3
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_an_unknown_way_of_splitting_needs_a_name(tmp_path: Path) -> None:
    tokenizer = byte_level("llama-bpe", more_text="123 456 12345 " * 2000)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    source = cut(tiny("llama"), tokenizer, tmp_path)
    with pytest.raises(ExportError, match="give it with --pre-tokenizer"):
        export_checkpoint(source, "gguf", tmp_path / "m.gguf")
    # A name that is known but wrong splits numbers in another way, which is noticed.
    with pytest.raises(ExportError, match=r"llama\.cpp splits text differently"):
        export_checkpoint(
            source, "gguf", tmp_path / "m.gguf", ExportOptions(pre_tokenizer="smollm")
        )
    assert not (tmp_path / "m.gguf").exists()
