"""Reading a tokenizer runs no code and asks nobody; windows begin as it begins an input."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral import tokenizer as mistral
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import cfsp
from builders import draw_windows, edit_json
from cfsp.checkpoint.gguf_tokenizer import BY_NAME
from cfsp.errors import CheckpointError, UsageError
from cfsp.recovery.data import read_text
from cfsp.recovery.loss import IGNORED
from cfsp.settings import CalibrationText, Text
from cfsp.text.drawing import consecutive_windows, draw_left_over, draw_text
from cfsp.text.tokenizers import beginning, load_tokenizer
from cfsp.text.windows import Windows
from tiny_models import build_tiny_model


def test_own_code_is_refused_and_nobody_is_asked(tmp_path, monkeypatch, capfd, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    edit_json(tmp_path / "tokenizer_config.json", lambda fields: fields.update(own))
    (tmp_path / "own.py").write_text("raise SystemExit('the code was run')")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(CheckpointError, match="code of its own, which cfsp does not run"):
        load_tokenizer(tmp_path)
    assert not asked
    assert not capfd.readouterr().out


def test_the_template_of_a_processor_is_that_of_its_tokenizer(tmp_path, tokenizer):
    """Those of LLaVA and Qwen2-VL lie in a file that transformers reads for a processor alone."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages[0] }}"


def test_a_tokenizer_of_mistral_is_the_same_whatever_is_installed(copied, tokenizer, monkeypatch):
    """With mistral-common, transformers takes that for all that have a tekken.json."""
    tekken_splits = json.dumps(BY_NAME["tekken"].steps[0])
    edit_json(copied / "config.json", lambda fields: fields.update(transformers_version="4.50.0"))
    monkeypatch.setattr(mistral, "is_mistral_common_available", lambda: True)
    monkeypatch.setitem(TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    edit_json(copied / "config.json", lambda fields: fields.update(model_type="mistral"))
    large = {f"x{number}": number for number in range(320, 100_001)}  # what is smaller is right
    edit_json(copied / "tokenizer.json", lambda fields: fields["model"]["vocab"].update(large))
    assert tekken_splits not in load_tokenizer(copied).backend_tokenizer.to_str()
    (copied / "tekken.json").write_text("{}")
    found = load_tokenizer(copied)
    assert found.chat_template == tokenizer.chat_template
    assert tekken_splits in found.backend_tokenizer.to_str()


def test_a_package_that_a_tokenizer_needs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("cfsp.text.tokenizers.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="copy the files of the model's own"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"of SentencePiece")
    with pytest.raises(CheckpointError, match=r"needs another package.*pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_at_a_text_is_told():
    without_unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"river": 0})))
    with pytest.raises(CheckpointError, match=r"no tokens of the text 'a' \(.*give one that takes"):
        beginning(without_unknown)
    with pytest.raises(CheckpointError, match=r"no tokens of the text 'b{40}\.\.\.' \(.*give one"):
        draw_windows([Text("b", ["b" * 50])], of_one_letter(), samples=1, seqlen=4)
    with pytest.raises(CheckpointError, match="no tokens of the text 'b"):
        read_text([Text("b", ["b"])], of_one_letter(), seqlen=8)


def of_one_letter() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a/path", "gives, found 'a/path'$"),
        (3, "gives, found int$"),
        (SimpleNamespace(image_processor=None), "calibration is by text alone: give its tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_told(given, message, text_file):
    model = build_tiny_model("llama")
    for work in (cfsp.calibrate, cfsp.prune):
        more = {"sparsity": 0.2} if work is cfsp.prune else {}
        with pytest.raises(UsageError, match=f"expected the tokenizer itself, .*{message}"):
            work(model, given, data=[text_file], samples=2, seqlen=16, **more)
    # Before a model is looked for.
    with pytest.raises(UsageError, match="no tokenizer: it has its own"):
        cfsp.calibrate("no/model", given, data=[text_file])
    with pytest.raises(UsageError, match="no tokenizer: it has its own"):
        cfsp.prune("no/model", given, out="out", sparsity=0.2, data=[text_file])


# What a window begins with.


BOS = 0


def with_template(tokenizer: Any, single: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return changed


def test_the_tokenizer_says_what_a_window_begins_with(tokenizer, bos_tokenizer):
    assert beginning(tokenizer) == ()
    assert beginning(tokenizer, "yes") == (BOS,)
    assert beginning(bos_tokenizer) == beginning(bos_tokenizer, "yes") == (BOS,)
    assert beginning(bos_tokenizer, "no") == ()
    # What it puts after a text is not what a text begins with.
    assert beginning(with_template(tokenizer, "<s> $A </s>")) == (BOS,)
    assert beginning(with_template(tokenizer, "$A </s>")) == ()
    # Some models begin with two tokens, some with EOS.
    assert beginning(with_template(tokenizer, "</s> <s> $A")) == (1, 0)
    assert beginning(with_template(tokenizer, "</s> $A")) == (1,)


def test_bos_that_is_not_there_cannot_be_asked_for(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert beginning(without) == ()
    with pytest.raises(UsageError, match="--bos yes needs a tokenizer with a BOS token"):
        beginning(without, "yes")
    with pytest.raises(UsageError, match="--bos must be one of auto, yes, no, found 'maybe'"):
        CalibrationText(bos="maybe")  # type: ignore[arg-type]


def every_kind(name: str, tokenizer: Any, bos: Any) -> dict[str, Windows]:
    text = CalibrationText((name,), samples=4, seqlen=16, bos=bos)
    return {
        "calibration": draw_text(text, tokenizer),
        "evaluation": consecutive_windows(name, tokenizer, count=3, seqlen=16, bos=bos),
        "left over": draw_left_over(text, tokenizer, 3),
    }


def test_every_kind_of_window_begins_with_bos(text_file, bos_tokenizer):
    ids = bos_tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    pieces = {tuple(ids[i : i + 15]) for i in range(0, len(ids), 15)}
    for kind, windows in every_kind(str(text_file), bos_tokenizer, "auto").items():
        assert windows.bos, kind
        assert windows.tokens_NT.shape[1] == 16, kind
        assert windows.tokens_NT[:, 0].tolist() == [BOS] * len(windows.tokens_NT), kind
        assert {tuple(row) for row in windows.tokens_NT[:, 1:].tolist()} <= pieces, kind
        assert set(windows.scored_N.tolist()) == {15}, kind
    whole = consecutive_windows(str(text_file), bos_tokenizer, count=None, seqlen=16)
    consecutive = whole.tokens_NT
    assert consecutive[:, 1:].flatten().tolist() == ids[: len(ids) // 15 * 15]


def test_without_bos_nothing_changes(text_file, tokenizer, bos_tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:4000])
    plain = every_kind(str(short), tokenizer, "auto")
    refused = every_kind(str(short), bos_tokenizer, "no")
    asked = every_kind(str(short), tokenizer, "yes")
    added = every_kind(str(short), bos_tokenizer, "auto")
    for kind in plain:
        assert not plain[kind].bos
        assert plain[kind].digest == refused[kind].digest
        assert asked[kind].digest == added[kind].digest != plain[kind].digest


def test_a_text_that_begins_with_bos_is_not_begun_twice(bos_tokenizer):
    text = Text("marked", "<s>" + "the river " * 40)
    tokens_NT = consecutive_windows(text, bos_tokenizer, count=3, seqlen=16).tokens_NT
    assert (tokens_NT == BOS).sum(dim=1).tolist() == [1, 1, 1]
    ids = bos_tokenizer(text.documents[0], add_special_tokens=False)["input_ids"]
    assert tokens_NT[0].tolist() == ids[:16]
    assert tokens_NT[1].tolist() == [BOS, *ids[16:31]]


def test_two_tokens_at_the_beginning_leave_two_less(text_file, tokenizer):
    changed = with_template(tokenizer, "</s> <s> $A")
    windows = draw_windows([str(text_file)], changed, samples=4, seqlen=16)
    assert windows.tokens_NT[:, :2].tolist() == [[1, 0]] * 4
    assert windows.scored_N.tolist() == [14] * 4
    with pytest.raises(UsageError, match="found 4 windows for 1 text and 2 tokens"):
        draw_windows([str(text_file)], changed, samples=4, seqlen=2)


def test_recovery_windows_begin_with_bos(text_file, bos_tokenizer):
    text = read_text([str(text_file)], bos_tokenizer, seqlen=16)
    assert text.bos and not read_text([str(text_file)], bos_tokenizer, seqlen=16, bos="no").bos
    for data in (text.train, text.held_out):
        assert data.token_NT[:, 0].tolist() == [BOS] * len(data)
        assert data.label_NT[:, 0].tolist() == [IGNORED] * len(data)
        assert torch.equal(data.label_NT[:, 1:], data.token_NT[:, 1:])


def test_recovery_windows_of_chats_begin_with_bos_once(bos_tokenizer, tmp_path):
    chatty = copy.deepcopy(bos_tokenizer)
    chatty.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "green stone"}]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 30))
    text = read_text([str(path)], chatty, seqlen=64)
    token_NT, label_NT = text.train.token_NT, text.train.label_NT
    assert token_NT[:, 0].tolist() == [BOS] * len(token_NT)
    assert not bool((token_NT[:, 1] == BOS).any())
    assert bool((label_NT[token_NT == BOS] == IGNORED).all())
    trained = label_NT != IGNORED
    assert torch.equal(label_NT[trained], token_NT[trained])
    assert chatty.decode(label_NT[0][trained[0]][:8].tolist()).startswith(" green stone")


def test_the_record_says_whether_windows_begin_with_bos(copied, bos_tokenizer, text_file, few):
    bos_tokenizer.save_pretrained(copied)
    (measured,) = cfsp.evaluate(copied, str(text_file), windows=3, seqlen=10)
    found = measured["perplexity"][str(text_file)]
    assert (found["bos"], found["tokens"]) == (True, 3 * 9)
    for bos, expected in (("auto", True), ("no", False)):
        statistics = cfsp.calibrate(copied, bos=bos, **few)
        assert statistics.record.bos is expected
        plan = cfsp.plan(copied, statistics, sparsity=0.2, block_metric="angular")
        assert plan.calibration["bos"] is expected
