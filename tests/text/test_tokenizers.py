"""Reading the tokenizer of a directory runs no code of it and asks nobody."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import cfsp
from builders import edit_json
from cfsp.errors import CheckpointError, UsageError
from cfsp.text.tokenizers import beginning, load_tokenizer
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


def test_a_tokenizer_that_fails_at_a_text_is_told():
    without_unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"river": 0})))
    with pytest.raises(CheckpointError, match=r"no tokens of the text 'a' \(.*give one that takes"):
        beginning(without_unknown)


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
    with pytest.raises(UsageError, match=f"expected the tokenizer itself, .*{message}"):
        cfsp.calibrate("no/model", given, data=[text_file])  # before a model is looked for
