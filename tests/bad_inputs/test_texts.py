"""Texts, tokenizers and .gguf files that are not what they should be."""

import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from bad_inputs.catalogue import RECOVER, BadInput, Place, Spoil, refusals, spoilt

TINY = "--out {out} --samples 4 --seqlen 32 --data"
CALIBRATE = f"calibrate {{model}} {TINY} {{inputs}}/"
PRUNE = f"prune {{model}} --sparsity 0.4 {TINY}"
EVAL = "eval {model} --windows 1 --seqlen 32 --data"
INSPECT = "inspect {inputs}/a.gguf"


def file(name: str, data: bytes) -> Spoil:
    return lambda place: (place.inputs / name).write_bytes(data)


def not_utf8(place: Place) -> None:
    buffers = [None, pa.py_buffer(struct.pack("<ii", 0, 3)), pa.py_buffer(b"a\xffb")]
    column = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"text": column}), place.inputs / "a.parquet")


def a_damaged_page(place: Place) -> None:
    path = place.inputs / "a.parquet"
    pq.write_table(pa.table({"text": ["some words " * 500]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(40)
    path.write_bytes(data)


def larger_vocabulary(directory: Path) -> None:
    """Give a model the tokenizer of another one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(5000)} | {"<unk>": 5000}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    for path in directory.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(directory)


def a_token_too_many(place: Place) -> None:
    """Give a tokenizer a token that the model lacks, and a text that has it at its end."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_tokens(["<|rare|>"])
    tokenizer.save_pretrained(place.model)
    place.text.write_text(place.text.read_text()[:4000] + "<|rare|>" * 32)


TEXTS = [
    *spoilt(
        f"{CALIBRATE}a.txt",
        "save it as UTF-8",
        ("a.txt, line 1 is binary", file("a.txt", b"\x00\x01\x02" * 500)),
        ("a.txt, line 1 is not UTF-8 text: byte 3", file("a.txt", b"abc\xfc")),
        ("a.txt, line 1 is not UTF-8 text: byte 0", file("a.txt", "text".encode("utf-16"))),
    ),
    BadInput(
        "recover {pruned} --steps 1 --seqlen 32 --out {out} --data {inputs}/a.jsonl",
        "{inputs}/a.jsonl, line 2: not JSON",
        "every line must be one JSON object",
        file("a.jsonl", b'{"text": "fine"}\n{"text": '),
    ),
    *spoilt(
        f"{CALIBRATE}a.jsonl",
        "",
        ("line must be one JSON object", file("a.jsonl", b"[" * 100_000)),
        ("character 1, which is no text; leave", file("a.jsonl", b'{"text": "x\\ud800"}')),
        (
            "line 2: half of a surrogate pair at character 1",
            file("a.jsonl", b'\n{"messages": [{"role": "user", "content": "x\\ud800"}]}'),
        ),
    ),
    BadInput(
        f"{CALIBRATE}a.parquet",
        "{inputs}/a.parquet is not a readable parquet file",
        "parquet",
        file("a.parquet", b"PAR1 nothing PAR1"),
    ),
    *spoilt(
        f"{CALIBRATE}a.parquet",
        "a.parquet is not a readable parquet file",
        ("'utf-8' codec can't decode byte 0xff", not_utf8),
        ("Corrupt snappy compressed data", a_damaged_page),
    ),
    *spoilt(
        f"{CALIBRATE}a.jsonl",
        "expected .txt, .jsonl or .parquet",
        ("a.jsonl is a directory or a pipe", lambda place: (place.inputs / "a.jsonl").mkdir()),
        ("a.jsonl is a directory or a pipe", lambda place: os.mkfifo(place.inputs / "a.jsonl")),
    ),
    BadInput(
        f"{EVAL} {{inputs}}/a.docx",
        "{inputs}/a.docx has an unknown ending",
        "expected .txt, .jsonl or .parquet",
        file("a.docx", b"x"),
    ),
]

TOKENIZERS = [
    BadInput(
        f"{PRUNE} {{text}}",
        "but {model} has a vocabulary of 320",
        "use the model's own tokenizer",
        lambda place: larger_vocabulary(place.model),
    ),
    BadInput(  # few windows choose blocks, and all repair
        "prune {model} --out {out} --parts blocks --set remove=1 --data {text} --seqlen 32",
        "the tokenizer gives token id 320, but {model} has a vocabulary of 320",
        "use the model's own tokenizer",
        a_token_too_many,
    ),
    BadInput(
        f"{RECOVER} --teacher none",
        "but {pruned} has a vocabulary of 320",
        "use the model's own tokenizer",
        lambda place: larger_vocabulary(place.pruned),
    ),
    BadInput(
        f"{EVAL} {{text}}",
        "{model} carries no usable tokenizer",
        "tokenizer.json",
        lambda place: (place.model / "tokenizer.json").write_text("{"),
    ),
]


def gguf(counts: bytes, rest: bytes = b"") -> Spoil:
    return file("a.gguf", b"GGUF" + struct.pack("<I", 3) + counts + rest)


KEY = struct.pack("<Q", 1) + b"k"

DAMAGED = "download it again"
GGUF = [
    *spoilt(
        INSPECT,
        DAMAGED,
        ("GGUF magic invalid", file("a.gguf", b"GGML" * 9)),
        ("to be version 77", file("a.gguf", b"GGUF" + struct.pack("<IQQ", 77, 0, 0))),
        ("its header reaches beyond its", gguf(struct.pack("<QQ", 1 << 60, 0))),
    ),
    BadInput(
        "calibrate {inputs}/a.gguf --out {out} --data {text}",
        "its header reaches beyond its",
        DAMAGED,
        gguf(struct.pack("<QQ", 0, 1), KEY + struct.pack("<IIQ", 9, 0, 1 << 60)),
    ),
    BadInput(INSPECT, "{inputs}/a.gguf holds no weight matrices", "safetensors", gguf(bytes(16))),
]

CASES = TEXTS + TOKENIZERS + GGUF

test_refused = refusals(CASES)
