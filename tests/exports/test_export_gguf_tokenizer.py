"""GGUF's tokenizer, both ways: llama.cpp gives a text the tokens that transformers does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import GenerationConfig, PreTrainedTokenizerFast

from builders import raising
from cfsp.checkpoint.gguf_import import gguf_reader, import_gguf
from cfsp.checkpoint.gguf_tokenizer import BY_NAME, PRE_TOKENIZERS, fields_of, tokenizer_of
from cfsp.checkpoint.llama_cpp import llama_cpp_tokens
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CannotSayError, ExportError, OutputError
from cfsp.exports.gguf import write
from cfsp.exports.registry import export
from cfsp.text.tokenizers import load_tokenizer
from conftest import byte_level_core, random_prose
from ragged import cut, gguf_fields_of, tiny

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[export]'")
pytest.importorskip("llama_cpp_py_sync", reason="no llama.cpp: pip install '.[export]'")
pytestmark = pytest.mark.usefixtures("splits_here", "own_cache")

TEXTS = [
    "It's 12345 o'clock; we'll see -- THEY'LL see!\n\n\n  def f(x):\n\treturn x**2 # 7",
    "naïve café, 北京 и Москва 😀   spaces   ",
    "a model prunes 2024 channels. the river runs under the stone",
]


def byte_level(name: str, more_text: str = "") -> PreTrainedTokenizerFast:
    core = byte_level_core(310, BY_NAME[name].splits(), [*TEXTS * 20, more_text])
    core.model.ignore_merges = BY_NAME[name].ignores_merges
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


def exported(
    tokenizer: PreTrainedTokenizerFast, directory: Path, name: str = "llama"
) -> tuple[Path, Path]:
    """Export a model with a tokenizer as m.gguf; return its directory, and that of its import."""
    source = cut(tiny(name), tokenizer, directory, (96, 96, 96))
    # What tests check is stricter than the verification, and that loads a model.
    export(source.directory, "gguf", directory / "m.gguf", verify=False)
    return source.directory, import_gguf(directory / "m.gguf")


def check(tokenizer: PreTrainedTokenizerFast, directory: Path) -> dict[str, Any]:
    """Compare tokens of a model, its export and the import; return the file's fields."""
    both = exported(tokenizer, directory)
    expected = llama_cpp_tokens(directory / "m.gguf", TEXTS)
    assert expected is not None
    for loaded in both:
        assert [load_tokenizer(loaded)(text)["input_ids"] for text in TEXTS] == expected
    return gguf_fields_of(directory / "m.gguf")


@pytest.mark.parametrize("name", [known.name for known in PRE_TOKENIZERS])
def test_byte_level(tmp_path, name):
    fields = check(byte_level(name), tmp_path)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == name
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert fields["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    fields = check(sentencepiece_like(prefix), tmp_path)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_special_tokens_and_chat_template(tmp_path):
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


def test_a_file_says_what_ends_a_turn(tmp_path):
    """As for Gemma and Phi-3, whose files have another token that ends a text."""
    tokenizer = byte_level("qwen2")
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    _, imported = exported(tokenizer, tmp_path, "qwen2")
    assert gguf_fields_of(tmp_path / "m.gguf")["tokenizer.ggml.eot_token_id"] == 310
    assert GenerationConfig.from_pretrained(imported).eos_token_id == [1, 310]


def test_added_tokens_that_no_bytes_are_written_as_come_back_whole(tmp_path):
    """DeepSeek's, which transformers reads as text of the bytes of their wide bars."""
    tokenizer, bar = byte_level("qwen2", "a    b " * 200), "\uff5c"
    spaces = {"ĠĠ", "ĠĠĠ"} & tokenizer.get_vocab().keys()  # ordinary ones of the same bytes
    assert spaces
    begin, end = (f"<{bar}{word}▁of▁sentence{bar}>" for word in ("begin", "end"))
    user = f"<{bar}User{bar}>"
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end})
    both = [user, "  ", "   "]
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in both])
    own, found = map(load_tokenizer, exported(tokenizer, tmp_path, "qwen2"))
    text = f"{begin}{user}the  river    runs{end}"
    expected = own(text)["input_ids"]
    assert expected[:2] == [310, 312] and expected[-1] == 311
    assert (found.bos_token_id, found.eos_token_id, len(found)) == (310, 311, 320)
    assert found(text)["input_ids"] == expected
    assert found.decode(expected, skip_special_tokens=True) == f"{user}the  river    runs"


def test_an_unknown_way_of_splitting_needs_a_name(tmp_path):
    tokenizer = byte_level("llama-bpe", more_text="123 456 12345 " * 2000)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    source = cut(tiny("llama"), tokenizer, tmp_path)
    with pytest.raises(ExportError, match="give it with --pre-tokenizer"):
        export(source.directory, "gguf", tmp_path / "m.gguf")
    # A name that is known but wrong splits numbers in another way, which is noticed.
    with pytest.raises(ExportError, match=r"llama\.cpp splits text differently"):
        export(source.directory, "gguf", tmp_path / "m.gguf", pre_tokenizer="smollm")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)],
)
def test_bos_is_what_llama_cpp_makes_of_a_file(tmp_path, monkeypatch, name, said, expected):
    from gguf import GGUFWriter

    if said is None:
        monkeypatch.setattr(GGUFWriter, "add_add_bos_token", lambda *_: None)
    source = cut(tiny("llama"), byte_level(name), tmp_path, (96, 96, 96))
    write(source, tmp_path / "m.gguf")
    monkeypatch.undo()
    directory = import_gguf(tmp_path / "m.gguf")
    tokens = load_tokenizer(directory)(TEXTS[0])["input_ids"]
    assert [tokens] == llama_cpp_tokens(tmp_path / "m.gguf", TEXTS[:1])
    assert (tokens[0] == 0) is expected
    export(directory, "gguf", tmp_path / "again.gguf")
    fields = gguf_fields_of(tmp_path / "again.gguf")
    assert fields["tokenizer.ggml.add_bos_token"] is expected


def test_white_space_behind_special_tokens_of_phi3(tmp_path):
    """llama.cpp knows it by the model's name."""
    from gguf import GGUFWriter

    tokenizer = sentencepiece_like(prefix=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|endoftext|>"]})
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "phi3")
    words, special = fields_of(tokenizer, 312, None)
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    fields = words | dict.fromkeys((*sizes, "head_count"), 1) | {"layer_norm_rms_eps": 1e-5}
    for field, value in (fields | {"name": "Phi-3-mini"}).items():
        getattr(writer, f"add_{field}")(value)
    special.add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    texts = ["<|user|>\n a model<|user|> runs", "<s> a model", "the stone"]
    tokenizer_of(path, gguf_reader(path)).save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert [found(text)["input_ids"] for text in texts] == llama_cpp_tokens(path, texts)


def test_a_vocabulary_may_have_no_letter_a_but_not_no_merges():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = BY_NAME["llama-bpe"].splits()
    core.train_from_iterator(["BCD BCD BC "], trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    capitals = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert capitals("a")["input_ids"] == []
    fields, _ = fields_of(capitals, 310, "llama-bpe")
    assert fields["tokenizer_model"] == "gpt2"
    data = json.loads(core.to_str())
    data["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    with pytest.raises(CannotSayError, match="has no merges, without which"):
        fields_of(bare, 310, "llama-bpe")


def test_a_full_temporary_directory_is_one_sentence(tokenizer, monkeypatch):
    """The package tokenizers has no error of its own for it."""
    full = raising(Exception("No space left on device (os error 28)"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"cannot write to .*No space left.*or set TMPDIR"):
        fields_of(tokenizer, 320, None)


@pytest.mark.parametrize(
    ("name", "why"),
    [("seed-coder", r"llama\.cpp splits text differently"), ("new", "cfsp does not know")],
)
def test_a_name_that_is_not_known_is_said_and_kept(tmp_path, caplog, name, why):
    # Numbers of several digits are tokens, which the first name's expression never gives.
    tokenizer = byte_level("gpt-2", more_text="123 456 12345 " * 2000)
    source = cut(tiny("llama"), tokenizer, tmp_path, (96, 96, 96))
    write(source, tmp_path / "m.gguf", pre_tokenizer=name)
    directory = import_gguf(tmp_path / "m.gguf")
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(f"^m.gguf: {why}.*; so the model may get other tokens", said)
    write(Checkpoint(directory), tmp_path / "again.gguf")
    assert gguf_fields_of(tmp_path / "again.gguf")["tokenizer.ggml.pre"] == name
