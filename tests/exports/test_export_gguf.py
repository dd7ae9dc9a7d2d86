"""GGUF: what llama.cpp reads is the same model; what it cannot express is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from builders import edit_tensors, entries
from cfsp.checkpoint import gguf_import
from cfsp.checkpoint.llama_cpp import llama_cpp_tokens
from cfsp.checkpoint.locating import demo_gguf
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError, MissingExtraError
from cfsp.exports import gguf_architecture
from cfsp.exports.gguf_architecture import warn_of_no_way_back
from cfsp.exports.registry import export
from cfsp.pipeline import prune_checkpoint
from cfsp.settings import Budget, CalibrationText, PruneSettings
from cfsp.text.offline import KINDS, kind_documents
from cfsp.text.tokenizers import load_tokenizer
from ragged import LINEAR, LLAMA3, WIDTHS, YARN, cut, gguf_fields_of, half_of, tiny
from stock import logits_of

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[export]'")
pytest.importorskip("llama_cpp_py_sync", reason="no llama.cpp: pip install '.[export]'")
pytestmark = pytest.mark.usefixtures("splits_here")

EQUAL = (64, 64, 64)


def to_gguf(source: Checkpoint, out: Path, kind: str | None = None, **more: Any) -> Any:
    return export(source.directory, "gguf", out, weight_type=kind, **more)


def types_of(path: Path) -> dict[str, str]:
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("name", "widths", "groups", "architecture"),
    [
        ("llama-biased", WIDTHS, None, "deci"),
        ("llama-biased", EQUAL, None, "llama"),
        ("qwen2", EQUAL, None, "qwen2"),
        # KV groups of their own, or none where the attention is gone.
        ("llama", WIDTHS, (2, 1, 0), "deci"),
        ("qwen2", WIDTHS, (2, 0, 1), "deci"),
        ("qwen3", WIDTHS, (2, 1, 2), "openelm"),
        # As many in all blocks, which is no obstacle anywhere.
        ("qwen3", EQUAL, (1, 1, 1), "qwen3"),
        # Its own graph wants queries as wide as the hidden state.
        ("qwen2", EQUAL, (1, 1, 1), "deci"),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, name, widths, groups, architecture):
    # Windows as long as the context: these graphs have none, which another test is about.
    model = tiny(name, sliding_window=None, use_sliding_window=False)
    source = cut(model, tokenizer, tmp_path, widths, groups)
    report = to_gguf(source, tmp_path / "m.gguf", "f32")
    assert report.layout == f"{architecture} in f32"
    assert report.verification.max_difference < 1e-4

    fields = gguf_fields_of(tmp_path / "m.gguf")
    assert fields["general.architecture"] == architecture
    found = fields[f"{architecture}.feed_forward_length"]
    assert found == (list(widths) if architecture in ("deci", "openelm") else widths[0])
    if groups is not None:
        each = model.config.num_attention_heads // model.config.num_key_value_heads
        differ = architecture in ("deci", "openelm")
        heads = [each * n for n in groups]
        for name, expected in (("head_count_kv", list(groups)), ("head_count", heads)):
            found = fields[f"{architecture}.attention.{name}"]
            assert found == (expected if differ else expected[0])


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_copy_of_the_embeddings_is_no_output_matrix(tmp_path, tokenizer, is_copy):
    source = cut(tiny("qwen3", tie_word_embeddings=True), tokenizer, tmp_path, (64, 32, 96))
    weights = source.directory / "model.safetensors"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if is_copy else 1)

    edit_tensors(weights, add)
    source = Checkpoint(source.directory)
    if is_copy:
        assert to_gguf(source, tmp_path / "m.gguf", "f32").layout == "openelm in f32"
    else:
        with pytest.raises(ExportError, match=r"no place for the tensor lm_head\.weight"):
            to_gguf(source, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", LINEAR),
        ("llama", LLAMA3),
        ("llama", YARN),
        ("qwen3", {**YARN, "attention_factor": 1.5}),
    ],
)
def test_rope_scaling_arrives(tmp_path, tokenizer, name, rope):
    source = cut(tiny(name, rope_parameters=rope), tokenizer, tmp_path)
    report = to_gguf(source, tmp_path / "m.gguf")
    assert report.verification.relative_error < 1e-5
    # The same file without the scaling would be noticed: it matters within the probe.
    plain = cut(tiny(name), tokenizer, tmp_path / "plain")
    models = [cfsp.load(each.directory) for each in (source, plain)]
    scaled, unscaled = (logits_of(each, torch.arange(24)[None]) for each in models)
    assert float((scaled - unscaled).abs().max()) > 0.01


# Models that llama.cpp runs with one width for all blocks only.
ONE_WIDTH: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
}


@pytest.mark.parametrize("name", ONE_WIDTH)
def test_the_advice_of_a_refusal_works(tmp_path, tokenizer, name):
    model = tiny(name, **ONE_WIDTH[name])
    blocks = model.config.num_hidden_layers
    source = cut(model, tokenizer, tmp_path, ((64, 32, 96) * 2)[:blocks])
    with pytest.raises(ExportError, match="prune with --widths equal"):
        to_gguf(source, tmp_path / "m.gguf")
    architecture = name.removesuffix("_text")

    text = cfsp.Text("text", ["How many words does a text need? " * 200])
    asked: dict[str, Any] = {"sparsity": 0.4, "widths": "equal", "multiple": 8, "data": [text]}
    cfsp.prune(tmp_path / "dense", out=tmp_path / "equal", samples=4, seqlen=32, **asked)
    report = to_gguf(Checkpoint(tmp_path / "equal"), tmp_path / "equal.gguf")
    assert report.layout == f"{architecture} in f32"
    assert gguf_fields_of(tmp_path / "equal.gguf")[f"{architecture}.feed_forward_length"] == 56
    assert not report.notes


def test_a_directory_called_as_a_type_is_read_back(tmp_path, tokenizer):
    """transformers takes a file that is named mistral for another type than it says."""
    source = cut(tiny("llama"), tokenizer, tmp_path, EQUAL)
    export(source.directory.rename(tmp_path / "mistral"), "gguf", tmp_path / "m.gguf")
    assert gguf_fields_of(tmp_path / "m.gguf")["general.name"] == "mistral-pruned"
    assert Checkpoint(gguf_import.import_gguf(tmp_path / "m.gguf")).config.model_type == "llama"


def test_no_way_back_to_gguf_is_said_before_pruning(tmp_path, save, text_file, caplog):
    text = CalibrationText((str(text_file),), samples=4, seqlen=32)
    for name in ("llama", *ONE_WIDTH):
        at = save(tiny(name, **ONE_WIDTH.get(name, {})))
        source = Checkpoint(at, "a.gguf")
        warn_of_no_way_back(Checkpoint(at, "dense"), Budget(0.3, multiple=8))
        warn_of_no_way_back(source, Budget(0.3, multiple=8, widths="equal"))
        # Equally many KV groups are said by a stock config, too.
        warn_of_no_way_back(source, Budget(0.3, parts=("kv",), widths="equal"))
        for more in ({}, {"widths": "equal", "keep": (0,)}):
            warn_of_no_way_back(source, Budget(0.3, multiple=8, **more))
    said = ["a.gguf becomes no .gguf file again if blocks differ: llama.cpp runs no"]
    assert [message[:70] for message in caplog.messages] == said * 2 * len(ONE_WIDTH)
    caplog.clear()
    tied = save(tiny("qwen3"))
    for parts in (("ffn", "kv"), ("attention",)):
        warn_of_no_way_back(Checkpoint(tied, "a.gguf"), Budget(0.3, parts=parts))
    (message,) = caplog.messages
    assert "without attention only through its deci graph" in message
    caplog.clear()
    settings = PruneSettings(Budget(0.3, multiple=8), text=text)
    prune_checkpoint(source, tmp_path / "plan", settings, dry_run=True)
    assert [each[:70] for each in caplog.messages if "llama.cpp" in each] == said


@pytest.mark.parametrize(
    ("name", "groups", "changes", "message"),
    [
        ("gemma", None, {}, r"gemma models is not .*: gemma2, gemma3_text, llama"),
        ("qwen3", (2, 0, 2), {}, "without attention only through its deci graph"),
        ("qwen3", None, {"tie_word_embeddings": False}, "no qwen3 model whose .* is not tied"),
        ("llama", None, {"hidden_act": "gelu"}, "silu, the model gelu"),
        (
            "llama", None, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported are: default, linear, llama3, yarn",
        ),
        # What its graphs do not read of a file.
        ("llama", None, {"rope_parameters": YARN | {"beta_fast": 8.0}}, "fast 32, the model 8"),
        ("qwen3", None, {"rope_parameters": YARN | {"beta_slow": 2.0}}, "slow 1, the model 2"),
        ("qwen3", None, {"rope_parameters": LLAMA3}, "openelm graph reads no factors"),
        ("qwen3", None, {"attention_bias": True}, "openelm graph reads no biases"),
        # What Gemma's graphs take for granted.
        ("gemma2", None, {"final_logit_softcapping": None}, "caps logits, the model does not"),
        ("gemma2", None, {"query_pre_attn_scalar": 8}, "scales the attention"),
        ("gemma2", None, {"tie_word_embeddings": False}, "no output matrix of its own"),
        ("gemma3_text", None, {"sliding_window_pattern": 2}, "multiple of 6, the model in"),
        ("gemma3_text", None, {"final_logit_softcapping": 30.0}, "caps no logits"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_say_is_refused(tmp_path, tokenizer, name, groups, changes, message):
    has_one_width = name in ("gemma2", "gemma3_text")
    model = tiny(name, **(ONE_WIDTH[name] if has_one_width else {}) | changes)
    widths = (64,) * model.config.num_hidden_layers if has_one_width else None
    source = cut(model, tokenizer, tmp_path, widths, groups)
    with pytest.raises(ExportError, match=message):
        to_gguf(source, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_stock_model_is_for_llama_cpps_own_converter(tmp_path, save):
    with pytest.raises(ExportError, match=r"; run llama.cpp's own converter on it(?!.*(vllm|mlx))"):
        to_gguf(Checkpoint(save(tiny("gemma"))), tmp_path / "m.gguf")


@pytest.mark.usefixtures("own_cache")
def test_gemma3_has_scaled_positions_in_whole_blocks_only(tmp_path, tokenizer, monkeypatch):
    positions = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    }
    model = tiny("gemma3_text", **ONE_WIDTH["gemma3_text"], rope_parameters=positions)
    source = cut(model, tokenizer, tmp_path, (64,) * 6)
    to_gguf(source, tmp_path / "m.gguf")
    fields = gguf_fields_of(tmp_path / "m.gguf")
    assert fields["gemma3.rope.freq_base"] == 5000.0
    assert fields["gemma3.rope.freq_base_swa"] == 100.0
    assert fields["gemma3.context_length"] == 256
    monkeypatch.setattr(gguf_import, "_warn_of_other_tokens", lambda *_: None)  # of no Gemma
    back = Checkpoint(gguf_import.import_gguf(tmp_path / "m.gguf")).config.rope_parameters
    for kind, said in positions.items():
        assert said.items() <= back[kind].items()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("pattern", [3, [True, True, False] * 2])
def test_windows_are_read_where_llama_cpp_has_them(tmp_path, tokenizer, monkeypatch, pattern):
    """In other blocks than a Gemma has; llama.cpp's logits say what a pattern means."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sizes: dict[str, Any] = {"num_hidden_layers": 6, "sliding_window": 8, "layer_types": types}
    model = tiny("gemma2", **ONE_WIDTH["gemma2"], **sizes)
    source = cut(model, tokenizer, tmp_path, (64,) * 6)
    monkeypatch.setattr(gguf_architecture, "_obstacles_of_gemma", lambda *_: ())
    rope = ({"rope_freq_base": 1e4, "sliding_window_pattern": pattern}, None)
    monkeypatch.setattr("cfsp.exports.gguf.rope_of", lambda *_: rope)
    to_gguf(source, tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_import, "_warn_of_other_tokens", lambda *_: None)  # of no Gemma
    assert Checkpoint(gguf_import.import_gguf(tmp_path / "m.gguf")).config.layer_types == types


def test_a_sliding_window_limits_the_context(tmp_path, tokenizer):
    source = cut(tiny("mistral"), tokenizer, tmp_path)
    report = to_gguf(source, tmp_path / "m.gguf")
    assert "limited to 16 tokens instead of 256" in report.notes[0]
    assert gguf_fields_of(tmp_path / "m.gguf")["deci.context_length"] == 16


@pytest.mark.parametrize(("kind", "error"), [("f16", 0.01), (None, 0.05), ("q8_0", 0.08)])
def test_types_written_here(tmp_path, tokenizer, kind, error):
    """The checkpoint's own is the default."""
    source = cut(tiny("llama").to(torch.bfloat16), tokenizer, tmp_path)
    report = to_gguf(source, tmp_path / "m.gguf", kind)
    assert 0 < report.verification.relative_error < error
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.ffn_down.weight"] == (kind or "bf16").upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert report.layout == f"deci in {kind or 'bf16'}"
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert not report.notes


def test_odd_widths_fall_back_to_f16(tmp_path, tokenizer):
    source = cut(tiny("llama"), tokenizer, tmp_path, (64, 40, 50))
    report = to_gguf(source, tmp_path / "m.gguf", "q8_0")
    assert "rows of 40, 50 weights do not divide into blocks of 32" in report.notes[0]
    types = types_of(tmp_path / "m.gguf")
    assert [types[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q8_0", "F16", "F16"]
    assert types["blk.1.ffn_up.weight"] == "Q8_0"


def test_k_quants_come_from_llama_cpp(tmp_path, tokenizer):
    model = tiny("llama", hidden_size=256, intermediate_size=512, initializer_range=0.05)
    source = cut(model, tokenizer, tmp_path, (256, 512, 288))
    report = to_gguf(source, tmp_path / "m.gguf", "q4_k_m")
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"
    assert types["blk.2.ffn_down.weight"] not in ("Q4_K", "Q6_K")  # 288 is not a multiple of 256
    assert "rows of 32, 288 weights do not divide into blocks of 256" in report.notes[0]
    assert 0 < report.verification.relative_error < 0.5
    assert entries(tmp_path) == {"dense", "pruned", "m.gguf"}


def test_a_wrong_copy_is_noticed_and_not_kept(tmp_path, tokenizer, monkeypatch):
    source = cut(tiny("llama"), tokenizer, tmp_path)
    monkeypatch.setattr("cfsp.exports.gguf.neighbours_together", lambda tensor, heads: tensor)
    with pytest.raises(ExportError, match="computes something else: relative error"):
        to_gguf(source, tmp_path / "m.gguf")
    monkeypatch.undo()
    monkeypatch.setattr("cfsp.exports.gguf.tokens_differ", lambda *_: None)  # its process died
    with pytest.raises(ExportError, match="ends when it splits text by the copy's tokenizer"):
        to_gguf(source, tmp_path / "m.gguf")
    assert entries(tmp_path) == {"dense", "pruned"}


def test_without_llama_cpp_nothing_is_verified_which_is_said(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("cfsp.exports.gguf.has_llama_cpp", lambda: False)
    source = cut(tiny("qwen3"), tokenizer, tmp_path)
    report = to_gguf(source, tmp_path / "m.gguf")
    assert report.verification is None
    assert "no llama.cpp is installed" in report.notes[0]
    monkeypatch.setattr("cfsp.exports.gguf._write_file", None)  # what would take minutes
    with pytest.raises(MissingExtraError, match="gguf export in q4_k_m needs packages"):
        to_gguf(source, tmp_path / "q4.gguf", "q4_k_m")


@pytest.mark.real
def test_the_real_model(tmp_path, demo):
    source = half_of(demo, tmp_path / "half")
    report = to_gguf(source, tmp_path / "m.gguf", "f32")
    assert report.layout == "deci in f32"
    assert report.verification.max_difference < 1e-3

    texts = [text for kind in KINDS for text in kind_documents(kind, "evaluation")]
    tokenizer = load_tokenizer(demo.directory)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    for path in (demo_gguf(), tmp_path / "m.gguf"):
        assert llama_cpp_tokens(path, texts) == expected
