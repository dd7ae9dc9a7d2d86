"""Training windows, held-out windows, and conversations."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

import cfsp.text.offline
from cfsp.errors import TextError
from cfsp.recovery.data import answer_tokens, read_text
from cfsp.recovery.loss import IGNORED
from cfsp.text.offline import KINDS
from cfsp.text.sources import TextSource

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "be quiet"},
        {"role": "user", "content": f"number {number} of the river"},
        {"role": "assistant", "content": f"green stone {number}"},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "light falls"},
    ]


def write_chat(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"messages": conversation(i)}) for i in range(count)))
    return path


def test_all_windows_are_used_once_and_some_of_each_text_are_held_out(
    tokenizer, text_file, other_text_file
):
    text = read_text([str(text_file), str(other_text_file)], tokenizer, seqlen=32)
    whole = read_text([str(text_file)], tokenizer, seqlen=32)
    count = whole.sources[str(text_file)]
    assert text.sources[str(text_file)] == count
    assert len(text.train) == sum(text.sources.values())
    train = {tuple(window.tolist()) for window in text.train.token_NT}
    held = {tuple(window.tolist()) for window in text.held_out.token_NT}
    assert train.isdisjoint(held)
    assert len(held) == len(text.held_out) >= 2
    assert (
        text.train.digest
        == read_text([str(text_file), str(other_text_file)], tokenizer, seqlen=32).train.digest
    )


def words_of(data, tokenizer):
    return {word for row in data.token_NT for word in tokenizer.decode(row).split()}


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_held_out_documents_are_spread_over_a_text(ending, tokenizer, tmp_path):
    """Of a text that is sorted, both ends are judged by, and nothing of what is trained on."""
    documents = [f"river stone d{number} light falls\n" * 130 for number in range(100)]
    path = tmp_path / f"sorted.{ending}"
    lines = [json.dumps({"text": document}) for document in documents]
    path.write_text("\n".join(lines) if ending == "jsonl" else "".join(documents))
    text = read_text([str(path)], tokenizer, seqlen=64)
    held, train = (
        sorted(int(word[1:]) for word in words_of(data, tokenizer) if re.fullmatch(r"d\d+", word))
        for data in (text.held_out, text.train)
    )
    assert 3 <= len(held) <= 8 and held[0] < 40 and held[-1] == 99
    assert 0.02 < len(text.held_out) / len(text.train) < 0.06
    if ending == "jsonl":
        assert not set(held) & set(train)


def test_every_kind_of_the_mixed_text_is_held_out(tokenizer, monkeypatch):
    def short(kind):
        return [{"text": f"{kind} number {number}\n" * 30} for number in range(40)]

    monkeypatch.setattr(cfsp.text.offline, "records", short)
    text = read_text(["mixed", "mixed/books"], tokenizer, seqlen=32)
    assert list(text.sources) == [f"mixed/{kind}" for kind in KINDS]
    for data in (text.held_out, text.train):
        assert words_of(data, tokenizer) >= set(KINDS)


def test_the_first_token_is_never_a_label(tokenizer, text_file):
    item = read_text([str(text_file)], tokenizer, seqlen=32).train[0]
    assert item["labels"][0] == IGNORED
    assert item["labels"][1:].tolist() == item["input_ids"][1:].tolist()


def test_only_answers_are_labelled(chat_tokenizer):
    ids, answer = answer_tokens(conversation(7), chat_tokenizer)
    trained = chat_tokenizer.decode([i for i, keep in zip(ids, answer, strict=True) if keep])
    assert trained.replace("</s>", "|").split("|") == [" green stone 7", "\n light falls", "\n"]
    assert "river" in chat_tokenizer.decode(ids)


def test_a_chat_file_is_packed_and_is_no_text(chat_tokenizer, tmp_path):
    path = write_chat(tmp_path / "chat.jsonl", 40)
    text = read_text([str(path)], chat_tokenizer, seqlen=64)
    label_NT = text.train.label_NT
    assert bool((label_NT != IGNORED).any(dim=1).all())
    share = float((label_NT != IGNORED).float().mean())
    assert 0.1 < share < 0.6
    with pytest.raises(TextError, match="which need a model's chat template"):
        TextSource(str(path), "calibration").documents()
    named = read_text([f"{path}:messages"], chat_tokenizer, seqlen=64)
    assert named.train.digest == text.train.digest


def test_a_chat_parquet_file(chat_tokenizer, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "chat.parquet"
    pq.write_table(pa.table({"messages": [conversation(i) for i in range(40)]}), path)
    as_lines = write_chat(tmp_path / "chat.jsonl", 40)
    found = read_text([f"{path}:messages"], chat_tokenizer, seqlen=64)
    expected = read_text([str(as_lines)], chat_tokenizer, seqlen=64)
    assert found.train.digest == expected.train.digest


def test_bad_conversations_are_errors(chat_tokenizer, tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(TextError, match=r"line 1: column 'messages' must be a list of messages"):
        read_text([str(path)], chat_tokenizer, seqlen=64)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    good = write_chat(tmp_path / "good.jsonl", 5)
    with pytest.raises(TextError, match="no chat template"):
        read_text([str(good)], plain, seqlen=64)
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(TextError, match="changes earlier messages"):
        read_text([str(good)], forgetful, seqlen=64)


def test_too_little_text_says_how_much_there_is(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a river")
    with pytest.raises(TextError, match="holds 0 windows of 64 tokens to learn from, 2 are needed"):
        read_text([str(path)], tokenizer, seqlen=64)
    with pytest.raises(TextError, match="give --data"):
        read_text([], tokenizer, seqlen=64)
