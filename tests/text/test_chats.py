"""Conversations as calibration and evaluation text, by the model's chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.errors import TextError
from cfsp.result.manifest import read_manifest
from cfsp.text.chats import conversation_texts
from cfsp.text.drawing import consecutive_windows
from cfsp.text.sources import TextSource
from drawn_windows import draw_windows


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"number {number} of the river"},
        {"role": "assistant", "content": f"green stone {number}"},
    ]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": conversation(i)}) for i in range(60)))
    return path


def test_a_conversation_is_what_the_template_makes_of_it(chats: Path, tokenizer: Any) -> None:
    expected = [f"number {i} of the river\ngreen stone {i}\n" for i in range(60)]
    assert list(TextSource(str(chats), "calibration").documents(tokenizer)) == expected
    named = TextSource(f"{chats}:messages", "evaluation")
    assert list(named.documents(tokenizer)) == expected
    ids = tokenizer("".join(expected), add_special_tokens=False)["input_ids"]
    windows = consecutive_windows(str(chats), tokenizer, count=None, seqlen=16)
    assert windows.tokens_NT.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert draw_windows([str(chats)], tokenizer, samples=8, seqlen=16).sources == {str(chats): 8}


def test_chats_need_a_template_that_takes_them(chats: Path, tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(TextError, match="no chat template, which chat data needs; give plain text"):
        draw_windows([str(chats)], plain, samples=8, seqlen=16)
    plain.chat_template = "{{ raise_exception('only one speaker') }}"
    with pytest.raises(TextError, match="conversation 1 does not fit the chat template: only one"):
        list(conversation_texts([conversation(0)], plain))


def test_a_model_is_pruned_and_measured_on_chats(
    chats: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = ["--data", str(chats), "--eval", str(chats), "--windows", "2", "--seqlen", "32"]
    command = ["prune", str(tiny_checkpoint("llama")), "--sparsity", "0.2", "--out", str(out)]
    assert main([*command, *text, "--samples", "8"]) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["calibration"]["sources"] == {str(chats): 8}
    assert manifest["perplexity"][str(chats)]["tokens"] == 2 * 255


def test_a_template_that_reads_the_parts_of_a_message(chats: Path, tokenizer: Any) -> None:
    """Those of LLaVA-OneVision and SmolVLM see nothing in a message that is a text itself."""
    of_parts = copy.deepcopy(tokenizer)
    of_parts.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    expected = [f"<user>number {i} of the river<assistant>green stone {i}" for i in range(60)]
    assert list(TextSource(str(chats), "calibration").documents(of_parts)) == expected
