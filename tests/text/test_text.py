"""Texts and windows: every kind of source, drawn by seed, disjoint, never padded, held out."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import draw_windows
from cfsp.errors import TextError, UsageError
from cfsp.settings import Text
from cfsp.text.drawing import consecutive_windows
from cfsp.text.records import conversation_texts
from cfsp.text.sources import TextSource
from cfsp.text.windows import (
    HELD_OUT_WINDOWS,
    Windows,
    few_windows,
    held_out_documents,
    is_held_out,
)

# Only Python takes the last characters for line ends.
DOCUMENTS = ["The first document.", "The second,\nin two lines.", "Das: äöü €\u2028two\u0085three."]


def read(name: object, purpose: Any = "calibration") -> list[str]:
    return list(TextSource(str(name), purpose).documents())


# Sources.


@pytest.mark.parametrize("name", ["a.txt", "a:b.txt", "A.TXT"])
def test_text_file_is_one_document(name, tmp_path):
    (tmp_path / name).write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    assert read(tmp_path / name) == ["\n\n".join(DOCUMENTS)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("a river", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "a river"}', encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.jsonl") == ["a river"]


def write_jsonl(path: Path, column: str = "text") -> Path:
    records = [{column: text, "id": i} for i, text in enumerate(DOCUMENTS)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    # Empty lines are harmless.
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, column: str) -> Path:
    pq.write_table(pa.table({column: DOCUMENTS, "id": [0, 1, 2]}), path)
    return path


@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize(
    ("write", "name"), [(write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")]
)
def test_records(write, name, column, tmp_path):
    path = write(tmp_path / name, column)
    assert read(path if column == "text" else f"{path}:body") == DOCUMENTS


@pytest.mark.parametrize("name", ["python-docs", "python-source"])
def test_offline_texts_have_disjoint_parts(name):
    calibration, evaluation = read(name), read(name, "evaluation")
    assert calibration and evaluation
    assert not set(calibration) & set(evaluation)
    assert len(evaluation) < len(calibration)
    assert sum(map(len, calibration)) > 200_000
    assert read(name) == calibration
    if name == "python-docs":
        from pydoc_data.topics import topics

        # Topics hold others whole: each of their paragraphs has one purpose.
        own, held = (
            {p for each in of for p in each.split("\n\n")} for of in (calibration, evaluation)
        )
        assert not own & held
        assert own | held == {p for each in topics.values() for p in each.split("\n\n")}
        assert set(evaluation) < set(topics.values())


def refused(name: object) -> str:
    with pytest.raises(TextError) as caught:
        read(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_no_text_is_refused(tmp_path):
    """More stands in bad_inputs/test_texts.py."""
    (tmp_path / "saved").mkdir()
    assert "expected .txt, .jsonl or .parquet, which datasets write" in refused(tmp_path / "saved")
    (tmp_path / "number.jsonl").write_text('{"text": 3}')
    assert "column 'text' is int, expected text" in refused(tmp_path / "number.jsonl")
    (tmp_path / "a.txt").write_text("a river")
    assert "has no column 'messages'" in refused(f"{tmp_path / 'a.txt'}:messages")
    on_hub = refused("no-one/nothing:default:train:text")
    assert "has no copy of no-one/nothing (default, train)" in on_hub  # tests are offline


def test_missing_column_lists_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    message = refused(f"{path}:title")
    assert "no column 'title'" in message and "text, id" in message
    pq.write_table(pa.table({"body": DOCUMENTS}), tmp_path / "a.parquet")
    assert "no column 'text'; it has: body" in refused(tmp_path / "a.parquet")


# Windows.


def test_windows_follow_the_seed(text_file, tokenizer):
    drawn = [
        draw_windows([str(text_file)], tokenizer, samples=8, seqlen=24, seed=seed).digest
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_windows_are_disjoint_pieces_of_the_text(text_file, tokenizer):
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    seqlen = 40
    pieces = [tuple(ids[i : i + seqlen]) for i in range(0, len(ids) - seqlen + 1, seqlen)]
    position = {piece: i for i, piece in enumerate(pieces)}
    assert len(position) == len(pieces)
    windows = draw_windows([str(text_file)], tokenizer, samples=len(pieces), seqlen=seqlen, seed=1)
    drawn = [tuple(row) for row in windows.tokens_NT.tolist()]
    # All of them, each once, in another order.
    assert sorted(position[row] for row in drawn) == list(range(len(pieces)))
    assert [position[row] for row in drawn] != list(range(len(pieces)))


def test_windows_are_drawn_evenly_from_each_text(text_file, other_text_file, tokenizer):
    names = [str(text_file), str(other_text_file)]
    own = Text("own", "river stone light " * 60)
    mixed = draw_windows([*names, own], tokenizer, samples=11, seqlen=16, seed=2)
    assert mixed.sources == {names[0]: 4, names[1]: 4, "own": 3}
    texts = [tokenizer.decode(row) for row in mixed.tokens_NT[4:8]]
    assert all(text.upper() == text for text in texts)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("river stone light " * 60)
    have = len(tokenizer(path.read_text())["input_ids"]) // 16
    assert len(draw_windows([str(path)], tokenizer, seqlen=16).tokens_NT) == have < 128
    needed = rf"holds {have} windows of 16 tokens, 500 are needed \(8000 tokens\)"
    with pytest.raises(TextError, match=needed):
        draw_windows([str(path)], tokenizer, samples=500, seqlen=16)
    with pytest.raises(TextError, match="12 are needed"):
        consecutive_windows(str(path), tokenizer, count=12, seqlen=1000)
    path.write_text("")
    (tmp_path / "a.jsonl").write_text("\n")
    for empty in (path, tmp_path / "a.jsonl"):
        with pytest.raises(TextError, match="holds 0 windows of 16 tokens: it is empty, or short"):
            draw_windows([str(empty)], tokenizer, seqlen=16)


def test_bad_counts_are_refused(text_file, tokenizer):
    name = str(text_file)
    with pytest.raises(UsageError, match="found 1 windows for 2 texts and 16 tokens"):
        draw_windows([name, name], tokenizer, samples=1, seqlen=16)
    with pytest.raises(UsageError, match=r"found 128 windows for 129 texts .* give more --samples"):
        draw_windows([Text(f"text {i}", "river stone") for i in range(129)], tokenizer, seqlen=2)
    with pytest.raises(UsageError, match="found 0 windows"):
        consecutive_windows(name, tokenizer, count=0, seqlen=16)


def test_evaluation_windows_are_the_first_ones_in_order(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl")
    # Documents are joined by an empty line.
    ids = tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    whole = consecutive_windows(str(path), tokenizer, count=None, seqlen=6)
    assert whole.tokens_NT.flatten().tolist() == ids[: len(ids) // 6 * 6]
    first = consecutive_windows(str(path), tokenizer, count=2, seqlen=6)
    assert first.tokens_NT.flatten().tolist() == ids[:12]
    assert first.sources == {str(path): 2}


def test_windows_say_whether_they_are_of_an_evaluation_part(tokenizer, text_file):
    """Of a file, what is measured on may have been calibrated on."""
    for text, expected in (("python-docs", True), (str(text_file), False)):
        windows = consecutive_windows(text, tokenizer, count=2, seqlen=16)
        assert windows.evaluation_part is expected


def test_text_longer_than_a_chunk_is_joined_by_empty_lines(tmp_path, tokenizer, monkeypatch):
    """Tokenising in pieces must lose no document and no separator."""
    import cfsp.text.drawing as module

    path = write_jsonl(tmp_path / "a.jsonl")
    whole = consecutive_windows(str(path), tokenizer, count=None, seqlen=2).tokens_NT.flatten()
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 10)
    pieces = consecutive_windows(str(path), tokenizer, count=None, seqlen=2).tokens_NT.flatten()
    # A separator may be left at the very end; a token more or less falls to the window's edge.
    expected = "\n\n".join(DOCUMENTS)
    for tokens in (whole, pieces):
        text = tokenizer.decode(tokens).rstrip()
        assert expected.startswith(text)
        assert len(expected) - len(text) <= 3


def test_digest_covers_tokens_and_shape():
    flat = torch.arange(12)
    digests = {
        Windows(flat.view(3, 4), {}).digest,
        Windows(flat.view(4, 3), {}).digest,
        Windows(flat.view(4, 3) + 1, {}).digest,
    }
    assert len(digests) == 3
    assert Windows(flat.view(3, 4).int(), {}).digest == Windows(flat.view(3, 4), {"x": 1}).digest


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 50))
def test_few_windows_are_of_every_source_and_spread_over_it(sizes, count):
    names = {f"mixed/{source}" if source else "own.txt": n for source, n in enumerate(sizes)}
    few = few_windows(Windows(torch.arange(sum(sizes))[:, None], names), count)
    places = few.tokens_NT[:, 0].tolist()
    assert len(places) == min(count, sum(sizes)) == sum(few.sources.values())
    assert places == sorted(set(places))
    assert len(few.sources) == min(count, len(sizes))
    end = 0
    for name, size in names.items():
        begin, end = end, end + size
        own = [place - begin for place in places if begin <= place < end]
        assert len(own) == few.sources.get(name, 0)
        if own:
            # Evenly, with as much before the first as after the last.
            steps = np.diff([-1 - own[0], *own, 2 * size - 1 - own[-1]])
            assert steps.max() - steps.min() <= 2


def test_few_windows_are_of_the_users_own_text_first_and_of_more_text_more():
    kinds = {f"mixed/{kind}": 7 for kind in range(9)}
    windows = Windows(torch.zeros(127, 1), {**kinds, "own.txt": 64})
    assert few_windows(windows, 1).sources == {"own.txt": 1}
    assert few_windows(windows, 10).sources == {**dict.fromkeys(kinds, 1), "own.txt": 1}
    assert few_windows(windows, 14).sources == {**dict.fromkeys(kinds, 1), "own.txt": 5}


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
    assert list(TextSource(str(chats), "calibration").texts(tokenizer)) == expected
    named = TextSource(f"{chats}:messages", "evaluation")
    assert list(named.texts(tokenizer)) == expected
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


# Those of LLaVA-OneVision and SmolVLM see nothing in a message that is a text itself.
OF_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
# Those of Llama 3.2, SmolLM3 and gpt-oss do: a killed run goes on tomorrow.
DATED = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} "
    '{{ strftime_now("%Y-%m-%d") }}'
)
CALLS = (
    "{% for m in messages %}{{ m['content'] }}{% for call in m.tool_calls or () %}"
    "[{{ call.function.name }}]{% endfor %}{% endfor %}"
)
QUOTED = {"role": "user", "content": 'a "river"'}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        (OF_PARTS, conversation(7), "<user>number 7 of the river<assistant>green stone 7"),
        # Of a text it would show the `a` of "assistant".
        (OF_PARTS, [QUOTED, {"role": "assistant", "content": "a"}], '<user>a "river"<assistant>a'),
        (DATED, conversation(7), "26 Jul 2024 2024-07-26"),
        (CALLS, [*conversation(7), CALL], "number 7 of the rivergreen stone 7[add]"),
        (CALLS, [{**CALL, "content": None}], "[add]"),
        ("{{ messages[0]['content'].upper() }}", [QUOTED], 'A "RIVER"'),
        ("{{ messages[0]['content'] | tojson }}", [QUOTED], json.dumps(QUOTED["content"])),
    ],
    ids=("parts", "part", "date", "tools", "null", "upper", "json"),
)
def test_what_templates_make_of_a_conversation(template, said, expected, tmp_path, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": said}))
    assert [*TextSource(str(path), "calibration").texts(other)] == [expected]


def test_images_are_left_out_and_that_is_said_once_of_each_text(tmp_path, tokenizer, caplog):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "a river"}]
    said: Any = [{"role": "user", "content": parts}] * 9
    with_parts = [{"messages": said}] * 9
    beside = [{"messages": conversation(0) * 9, "images": ["none.png"]}] * 9
    of_text = [{"text": "a river " * 40, "images": ["none.png"]}] * 9
    places = []
    for number, records in enumerate((with_parts, beside, of_text)):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, records)))
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{number}.parquet")
        places += [tmp_path / f"{number}.jsonl", tmp_path / f"{number}.parquet"]
    for place in places:
        TextSource(str(place), "calibration").open()
        text = tokenizer.decode(draw_windows([str(place)], tokenizer, seqlen=16).tokens_NT[0])
        assert "river" in text
    told = [record.getMessage() for record in caplog.records if "images" in record.getMessage()]
    assert told == [f"{at}: its images are left out, only its text is read" for at in places]


def test_images_on_the_hub_are_not_decoded(monkeypatch):
    """Pictures would need Pillow, and none of these is one."""
    stored = [{"text": "a river", "images": {"bytes": b"no picture", "path": None}}] * 2
    features = datasets.Features(text=datasets.Value("string"), images=datasets.Image())
    data = datasets.Dataset.from_list(stored).to_iterable_dataset().cast(features)
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    monkeypatch.setattr("cfsp.text.records.hub_is_missed", lambda: False)
    assert read("someone/pictures:default:train:text") == ["a river"] * 2


@settings(max_examples=30)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=6))
def test_every_text_is_held_out_in_part_and_fitted_in_part(parts):
    mask_N = is_held_out(parts)
    assert len(mask_N) == sum(parts)
    for part_N in torch.split(mask_N, parts):
        assert part_N.any()
        assert not part_N.all()
    assert int(mask_N.sum()) <= HELD_OUT_WINDOWS + len(parts)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([2], [1]),
        ([16], [7, 15]),
        ([32], [7, 15, 23, 31]),
        ([64], [15, 31, 47, 63]),
        ([65], [16, 33, 50]),
        ([3, 3], [2, 5]),  # a text that would have none holds out its last
    ],
)
def test_a_text_holds_out_every_eighth_and_about_four(parts, expected):
    assert is_held_out(parts).nonzero().flatten().tolist() == expected
    windows = Windows(torch.zeros(sum(parts), 4), dict(zip("ab", parts, strict=False)))
    assert windows.held_out_N.nonzero().flatten().tolist() == expected


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 400))
def test_held_out_documents_have_as_many_tokens_as_asked_and_at_most_one_more(sizes, least):
    held = [size for size, own in zip(sizes, held_out_documents(sizes, least), strict=True) if own]
    assert sum(held) >= min(least, sum(sizes))
    assert sum(held) < least + max(sizes, default=0) or not sum(sizes)
