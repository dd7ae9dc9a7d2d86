"""Chats that the dense model writes itself: which they are, and what recovery makes of them."""

import copy
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

from builders import read_json, stopped_at
from cfsp.checkpoint.loading import load
from cfsp.quality.generation import Generator
from cfsp.recovery import own_chats as module
from cfsp.recovery.data import OWN_CHATS, WindowData, answer_tokens, read_text, with_chats
from cfsp.recovery.loss import IGNORED
from cfsp.recovery.own_chats import opening_of, own_chats
from cfsp.recovery.settings import Limit, Training
from recovery.conftest import recover, training

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def with_turns(tokenizer: Any, end: str) -> Any:
    """Return the tokenizer with a template that ends turns with a token of the vocabulary."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken(end, normalized=False)])
    changed.chat_template = TEMPLATE.replace("END", end)
    return changed


@pytest.fixture(autouse=True)
def few_words(monkeypatch) -> None:
    monkeypatch.setattr(module, "_QUESTION_TOKENS", 24)
    monkeypatch.setattr(module, "_ANSWER_TOKENS", 16)


@pytest.fixture(scope="module")
def dense(model) -> Any:
    return load(model, dtype="float32")


@pytest.fixture(scope="module")
def chatting(dense, tokenizer) -> Any:
    """Ends turns with what the tiny model says often."""
    start = torch.tensor([tokenizer("<s>user: ", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        likeliest = dense(start).logits[0, -1].topk(20).indices.tolist()
    words = (tokenizer.convert_ids_to_tokens(token) for token in likeliest)
    return with_turns(tokenizer, next(word for word in words if word.isalpha()))


@pytest.fixture
def saved(pruned, chatting, tmp_path) -> Path:
    """A pruned model whose tokenizer chats."""
    copied = tmp_path / "chatting"
    shutil.copytree(pruned, copied)
    chatting.save_pretrained(copied)
    return copied


def test_a_template_opens_a_turn_where_a_token_ends_it(tokenizer, chatting):
    assert chatting.decode(opening_of(chatting)).replace(" ", "") == "<s>user:"
    for template in (None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"):
        without = copy.deepcopy(tokenizer)
        without.chat_template = template
        assert opening_of(without) == []


def test_a_model_asks_itself_and_answers(dense, chatting, monkeypatch):
    chats = own_chats(dense, chatting, 40, seed=3)
    assert 4 < len(chats) <= 40
    for user, assistant in chats:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] and assistant["content"]
    assert chats == own_chats(dense, chatting, 40, seed=3)
    assert chats != own_chats(dense, chatting, 40, seed=4)
    # A question that leaves no room for an answer is none.
    monkeypatch.setattr(dense.config, "max_position_embeddings", module._ANSWER_TOKENS)
    assert own_chats(dense, chatting, 40, seed=3) == []


def test_chats_are_a_quarter_of_a_pass(chatting, text_file):
    text = read_text([str(text_file)], chatting, seqlen=32)
    chats = [
        [
            {"role": "user", "content": f"number {number} of the river"},
            {"role": "assistant", "content": f"green stone {number} and light falls"},
        ]
        for number in range(12)
    ]
    found = with_chats(text, chats, chatting)
    added = len(found.train) - len(text.train)
    assert found.sources == text.sources | {OWN_CHATS: added}
    assert added / len(found.train) == pytest.approx(0.25, abs=0.05)
    assert len(found.held_out) > len(text.held_out)
    # Only answers are learnt, and each is there as often as another.
    label_NT = found.train.label_NT[len(text.train) :]
    learnt = label_NT[label_NT != IGNORED]
    whole = torch.cat([answer_tokens(chat, chatting) for chat in chats], dim=1)[1]
    assert set(learnt.tolist()) <= set(whole.tolist()) - {IGNORED}
    assert len(set(map(tuple, label_NT.tolist()))) < added
    times = Counter(map(tuple, found.train.token_NT[len(text.train) :].tolist()))
    assert len(set(times.values())) == 1
    # Of a text that is shorter than all of them there are fewer, not more of them than of it.
    short = replace(text, train=WindowData(text.train.token_NT[:6], text.train.label_NT[:6]))
    assert len(with_chats(short, chats, chatting).train) == 6 + 2
    # Too little is nothing.
    assert with_chats(text, [], chatting) is text


def test_recovery_learns_from_them(saved, model, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr("cfsp.recovery.own_chats._LEAST_WINDOWS", 1)

    def run(out: Path) -> dict[str, Any]:
        how = training(2, evaluations=1, own_chats=32)
        recover(saved, out, text_file, teacher=str(model), training=how)
        found: dict[str, Any] = read_json(out / "cfsp.json")["recovery"]
        return found

    whole = run(tmp_path / "whole")
    assert whole["data"]["sources"][OWN_CHATS]
    # A killed run trains on those that it had written.
    out = tmp_path / "killed"
    stopped_at("cfsp.recovery.recover.train", run, out)
    monkeypatch.setattr("cfsp.recovery.own_chats.own_chats", None)
    again = run(out)
    same = ("data", "history", "tokens")
    assert {name: again[name] for name in same} == {name: whole[name] for name in same}


def test_a_model_that_is_too_slow_writes_none_and_stops_early(dense, chatting, monkeypatch):
    said: list[Any] = []

    def continue_from(self: Any, *args: Any, **how: Any) -> Any:
        said.append(original(self, *args, **how))
        return said[-1]

    original = Generator.continue_from
    monkeypatch.setattr(Generator, "continue_from", continue_from)
    assert own_chats(dense, chatting, 40, seed=3, seconds=1e-6) == []
    assert {len(tokens) for some in said for tokens in some} == {1}


def test_a_model_that_padding_disturbs_writes_none(dense, chatting, monkeypatch):
    assert own_chats(dense, chatting, 8, seed=3)
    monkeypatch.setattr("cfsp.quality.generation._MOST_OF_PADDING", -1.0)
    assert own_chats(dense, chatting, 8, seed=3) == []


def test_they_have_a_quarter_of_the_minutes(saved, model, tmp_path, text_file, monkeypatch):
    def own_chats(model: Any, tokenizer: Any, count: int, seed: int, seconds: float) -> Any:
        raise LookupError(f"{count} chats in {seconds} seconds")

    monkeypatch.setattr("cfsp.recovery.own_chats.own_chats", own_chats)
    how = Training(Limit(minutes=1), batch_windows=4, seqlen=32, evaluations=1)
    with pytest.raises(LookupError, match=r"^128 chats in 15\.0 seconds$"):
        recover(saved, tmp_path / "out", text_file, teacher=str(model), training=how)


@pytest.mark.parametrize(
    ("windows", "asked", "found"), [(8, {}, [128]), (9, {}, []), (8, {"own_chats": 0}, [])]
)
def test_a_short_run_has_none(
    windows, asked, found, saved, model, tmp_path, text_file, monkeypatch
):
    begun: list[int] = []

    def none(model: Any, tokenizer: Any, count: int, seed: int, seconds: float) -> Any:
        begun.append(count)
        return []

    monkeypatch.setattr("cfsp.recovery.own_chats.own_chats", none)
    monkeypatch.setattr("cfsp.recovery.own_chats._LEAST_WINDOWS", windows)
    how: dict[str, Any] = {"training": training(2, evaluations=1, **asked)}  # of four windows each
    run = (recover, saved, tmp_path / "out", text_file)
    stopped_at("cfsp.recovery.recover.train", *run, teacher=str(model), **how)
    assert begun == found
