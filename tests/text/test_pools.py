"""What windows are drawn from: all of a long text, each text once, and no less than was asked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import cfsp.text.drawing
from builders import draw_windows, windows_left_over
from cfsp.errors import TextError
from cfsp.settings import Text
from cfsp.text.drawing import consecutive_windows, shares_within
from cfsp.text.offline import KINDS

LINES = 4000


@pytest.fixture
def characters(tokenizer, noted) -> list[int]:
    """How many characters the tokenizer is given each time."""
    return noted(type(tokenizer), "__call__", lambda _, text, **__: len(text))


@pytest.fixture
def short_pieces(monkeypatch) -> None:
    monkeypatch.setattr(cfsp.text.drawing, "_DRAWN_CHARACTERS", 8000)
    monkeypatch.setattr(cfsp.text.drawing, "_PIECE_CHARACTERS", 400)


def sorted_text(path: Path) -> Path:
    """Write a text whose lines say where they are, in tenths of the text."""
    lines = [f"river {chr(ord('a') + 10 * i // LINES)} stone\n" for i in range(LINES)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    else:
        path.write_text("".join(lines))
    return path


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_long_text_is_drawn_from_all_over(ending, tokenizer, characters, tmp_path):
    path = sorted_text(tmp_path / f"sorted.{ending}")
    windows = draw_windows([str(path)], tokenizer, samples=8, seqlen=24)
    assert 0 < sum(characters) < 8100 + 10 < path.stat().st_size / 5
    words = (word for row in windows.tokens_NT for word in tokenizer.decode(row).split())
    assert len({word for word in words if len(word) == 1}) >= 4
    again = draw_windows([str(path)], tokenizer, samples=8, seqlen=24)
    assert again.digest == windows.digest


def test_the_beginning_of_one_long_line_is_not_all_of_it(tokenizer, characters, tmp_path):
    text = "river stone light " * 20_000
    (tmp_path / "line.txt").write_text(text)
    first = consecutive_windows(str(tmp_path / "line.txt"), tokenizer, count=2, seqlen=16)
    assert 0 < sum(characters) < 2000
    whole = consecutive_windows(Text("it", text[:500]), tokenizer, count=2, seqlen=16)
    assert first.digest == whole.digest


def test_a_short_text_is_told_and_filled_up(tokenizer, text_file, other_text_file, caplog):
    short = Text("short", "river stone light " * 30)
    names = [str(text_file), short, str(other_text_file)]
    windows = draw_windows(names, tokenizer, samples=30, seqlen=16)
    have = windows.sources["short"]
    assert 1 <= have < 10 and len(windows.tokens_NT) == sum(windows.sources.values()) == 30
    missing = 10 - have
    assert windows.sources[str(text_file)] == 10 + (missing + 1) // 2
    draw_windows(names, tokenizer, samples=30, seqlen=16)
    told = f"short holds {have} windows of 16 tokens, fewer than its share of 10"
    assert caplog.text.count(told) == 1, "as a run that draws several times says it"
    empty = Text("empty", "a")
    with pytest.raises(TextError, match="empty holds 0 windows"):
        draw_windows([names[0], empty], tokenizer, samples=8, seqlen=16)


def test_what_some_cannot_have_others_have_evenly():
    assert shares_within([4, 4, 4], [9, 9, 9]) == [4, 4, 4]
    assert shares_within([4, 4, 4], [9, 1, 9]) == [6, 1, 5]
    assert shares_within([4, 4, 4], [5, 1, 9]) == [5, 1, 6]
    assert shares_within([4, 4, 4], [2, 1, 3]) == [2, 1, 3]
    assert shares_within([1, 0], [0, 3]) == [0, 1]


def drawn_once(texts: list[str | Text], tokenizer: Any) -> dict[str, int]:
    conditions: dict[str, Any] = {"samples": 20, "seqlen": 16, "seed": 0}
    drawn = draw_windows(texts, tokenizer, **conditions)
    left = windows_left_over(texts, tokenizer, count=5, **conditions)
    rows = [tuple(row) for row in [*drawn.tokens_NT.tolist(), *left.tokens_NT.tolist()]]
    assert len(set(rows)) == len(rows) == 25
    return drawn.sources


def test_what_is_left_over_is_even_and_may_not_be_enough(tokenizer):
    texts = [Text(name, f"{name} river stone light " * 200) for name in ("one", "two")]
    left = windows_left_over(texts, tokenizer, 7, samples=9, seqlen=16)
    assert left.sources == {"one": 4, "two": 3}
    have = len(draw_windows(texts[:1], tokenizer, seqlen=64).tokens_NT)
    with pytest.raises(TextError, match=rf"calibration takes {have}; 2 others.*or more text"):
        windows_left_over(texts[:1], tokenizer, 2, seqlen=64)


def test_a_text_with_two_names_is_drawn_from_once(tokenizer, text_file, tmp_path):
    short, link = tmp_path / "short.txt", tmp_path / "link.txt"
    short.write_text(text_file.read_text()[:4000])
    link.symlink_to(short)
    name = str(short)
    for other in (name, os.path.relpath(name), str(link), f"{name}:text"):
        assert drawn_once([name, other], tokenizer) == {name: 20}


@pytest.mark.usefixtures("short_kinds")
def test_kinds_that_are_named_beside_the_mixed_text_are_drawn_from_once(tokenizer):
    sources = drawn_once(["mixed", "mixed/books"], tokenizer)
    assert sources["mixed/books"] == 11 and sum(sources.values()) == 20
    assert list(sources) == [f"mixed/{kind}" for kind in KINDS]
