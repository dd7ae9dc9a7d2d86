"""The mixed text: every kind reads, has sources and licences, and is the same everywhere."""

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cfsp.text.offline
from builders import draw_windows
from cfsp.errors import TextError
from cfsp.settings import DEFAULT_TEXT, Text
from cfsp.text.drawing import parts_with_shares
from cfsp.text.offline import KINDS, MIXED, records
from cfsp.text.sources import TextSource
from cfsp.text.tokenizers import load_tokenizer

MIXTURE = Path(cfsp.text.offline.__file__).with_name("mixture")
LICENCES = {path.stem for path in (MIXTURE / "licences").glob("*.txt")}


def read(name: str, purpose: Any = "calibration") -> list[str]:
    return list(TextSource(name, purpose).documents())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_reads_in_two_disjoint_parts(kind):
    calibration, evaluation = read(f"mixed/{kind}"), read(f"mixed/{kind}", "evaluation")
    assert not set(calibration) & set(evaluation)
    texts = [record["text"] for record in records(kind)]
    assert calibration + evaluation == texts
    size = sum(map(len, texts))
    assert 0.15 < sum(map(len, evaluation)) / size < 0.3
    assert max(map(len, texts)) < size / 15  # a window is not all of one kind's text


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_has_a_source_and_a_licence(kind):
    listed = (MIXTURE / "SOURCES.md").read_text(encoding="utf-8")
    for record in records(kind):
        assert set(record) == {"text", "title", "author", "source", "licence"}
        assert all(value.strip() for value in record.values())
        fields = (record[name] for name in ("title", "author", "source", "licence"))
        assert f"| {' | '.join(field.replace('|', chr(92) + '|') for field in fields)} |" in listed
        # Of "A OR B", one is enough.
        named = {*record["licence"].split(" OR ")}
        assert named == {"Public domain"} or LICENCES & named, record


def test_the_licences_are_those_that_the_package_names():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    expression = next(line for line in pyproject.splitlines() if line.startswith("license ="))
    assert set(expression.split('"')[1].split(" AND ")) == LICENCES - {"NOTICES"}


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_all_kinds_come_by_turns(purpose):
    kind_of = {text: kind for kind in KINDS for text in read(f"mixed/{kind}", purpose)}
    texts = read("mixed", purpose)
    assert sorted(texts) == sorted(kind_of)
    given: Counter[str] = Counter()
    for text in texts[: len(texts) // 4]:
        given[kind_of[text]] += len(text)
    assert set(given) == set(KINDS)
    assert max(given.values()) - min(given.values()) <= max(map(len, texts))


@pytest.mark.usefixtures("short_kinds")
def test_windows_are_drawn_evenly_from_each_kind(tokenizer):
    windows = draw_windows(["mixed"], tokenizer, samples=22, seqlen=32)
    assert list(windows.sources) == [f"mixed/{kind}" for kind in KINDS]
    assert list(windows.sources.values()) == [3] * 4 + [2] * 5
    # Each kind has a window that repair is judged by.
    ends = [0]
    for count in windows.sources.values():
        ends.append(ends[-1] + count)
    assert all(windows.held_out_N[start:end].any() for start, end in pairwise(ends))
    few = draw_windows(["mixed"], tokenizer, samples=2, seqlen=32)
    assert few.sources == {"mixed/encyclopaedia": 1, "mixed/web": 1}
    parts = parts_with_shares(["mixed", "a.txt", "a.txt"], 128)
    assert sum(share > 0 for _, share in parts) == len(KINDS) + 1


@pytest.mark.usefixtures("short_kinds")
def test_the_mixed_text_has_the_share_of_one_text(tokenizer):
    own = Text("own", "green light falls " * 400)
    windows = draw_windows(["mixed", own], tokenizer, samples=36, seqlen=32)
    assert windows.sources == {**{f"mixed/{kind}": 2 for kind in KINDS}, "own": 18}


def test_a_package_without_its_text_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cfsp.text.offline, "_DIRECTORY", tmp_path)
    with pytest.raises(TextError, match=r"books.jsonl.gz, which is part of this package .*again"):
        read("mixed/books")


def test_the_documents_are_the_same_everywhere():
    assert DEFAULT_TEXT == MIXED
    digest = hashlib.sha256("\0".join(read("mixed")).encode()).hexdigest()
    assert digest == DOCUMENTS_DIGEST


@pytest.mark.real
def test_the_windows_are_the_same_everywhere(demo):
    windows = draw_windows(["mixed"], load_tokenizer(demo.directory))
    assert sum(windows.sources.values()) == 128
    assert windows.digest == WINDOWS_DIGEST


DOCUMENTS_DIGEST = "568483f735084b826fbe84fb22f72ed9008f44f6f0da4be4ccc20bfef4978e51"
WINDOWS_DIGEST = "5f0224793a66ea4daefc74704158e99fcdf55539bf3db572f2122ec404f480c2"
