"""Conversations as calibration and evaluation text, by the model's chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from builders import draw_windows
from cfsp.errors import TextError
from cfsp.text.chats import conversation_texts
from cfsp.text.drawing import consecutive_windows
from cfsp.text.sources import TextSource


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"number {number} of the river"},
        {"role": "assistant", "content": f"green stone {number}"},
    ]


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": conversation(i)}) for i in range(60)))
    return path


def test_a_conversation_is_what_the_template_makes_of_it(chats, tokenizer):
    expected = [f"number {i} of the river\ngreen stone {i}\n" for i in range(60)]
    assert list(TextSource(str(chats), "calibration").documents(tokenizer)) == expected
    named = TextSource(f"{chats}:messages", "evaluation")
    assert list(named.documents(tokenizer)) == expected
    ids = tokenizer("".join(expected), add_special_tokens=False)["input_ids"]
    windows = consecutive_windows(str(chats), tokenizer, count=None, seqlen=16)
    assert windows.tokens_NT.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert draw_windows([str(chats)], tokenizer, samples=8, seqlen=16).sources == {str(chats): 8}


def test_chats_need_a_template_that_takes_them(chats, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(TextError, match="no chat template, which chat data needs; give plain text"):
        draw_windows([str(chats)], plain, samples=8, seqlen=16)
    plain.chat_template = "{{ raise_exception('only one speaker') }}"
    with pytest.raises(TextError, match="conversation 1 does not fit the chat template: only one"):
        list(conversation_texts([conversation(0)], plain))


def test_a_template_that_reads_the_parts_of_a_message(chats, tokenizer):
    """Those of LLaVA-OneVision and SmolVLM see nothing in a message that is a text itself."""
    of_parts = copy.deepcopy(tokenizer)
    of_parts.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    expected = [f"<user>number {i} of the river<assistant>green stone {i}" for i in range(60)]
    assert list(TextSource(str(chats), "calibration").documents(of_parts)) == expected
