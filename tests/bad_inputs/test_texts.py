"""Texts, tokenizers and .gguf files that are not what they should be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_inputs.catalogue import BadInput, Place, Table

# What to do.
UTF8, AGAIN = "save it as UTF-8", "download it again"
JSON = "every line must be one JSON object"
TINY = "--out {out} --samples 4 --seqlen 32 --data"
CALIBRATE = f"calibrate {{model}} {TINY} {{inputs}}/"
PRUNE = f"prune {{model}} --sparsity 0.4 {TINY}"
INSPECT = "inspect {inputs}/a.gguf"


def file(name: str, data: bytes) -> Callable[[Place], object]:
    return lambda place: (place.inputs / name).write_bytes(data)


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


def without_bos(directory: Path) -> None:
    """Take the BOS token from a model's tokenizer."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    path.write_text(json.dumps(settings))


TEXTS: Table = {
    "empty text": BadInput(
        f"{CALIBRATE}a.txt", "{inputs}/a.txt holds 0 windows", "give more text", file("a.txt", b"")
    ),
    "tiny text": BadInput(
        f"{PRUNE} {{inputs}}/a.txt",
        "{inputs}/a.txt holds 0 windows of 32 tokens, 4 are needed",
        "give more text",
        file("a.txt", b"few words"),
    ),
    "binary text": BadInput(
        f"{CALIBRATE}a.txt",
        "{inputs}/a.txt, line 1 is binary",
        UTF8,
        file("a.txt", b"\x00\x01\x02" * 500),
    ),
    "text in Latin-1": BadInput(
        f"{CALIBRATE}a.txt",
        "{inputs}/a.txt, line 1 is not UTF-8 text: byte 3",
        UTF8,
        file("a.txt", b"abc\xfc"),
    ),
    "text in UTF-16": BadInput(
        "eval {model} --windows 1 --seqlen 32 --data {inputs}/a.txt",
        "{inputs}/a.txt, line 1 is not UTF-8 text: byte 0",
        UTF8,
        file("a.txt", "text".encode("utf-16")),
    ),
    "lines that are no JSON": BadInput(
        "recover {pruned} --steps 1 --seqlen 32 --out {out} --data {inputs}/a.jsonl",
        "{inputs}/a.jsonl, line 2: not JSON",
        JSON,
        file("a.jsonl", b'{"text": "fine"}\n{"text": '),
    ),
    "lines nested too deeply": BadInput(
        f"{CALIBRATE}a.jsonl",
        "{inputs}/a.jsonl, line 1: not JSON",
        JSON,
        file("a.jsonl", b"[" * 100_000),
    ),
    "half of a surrogate pair": BadInput(
        f"{CALIBRATE}a.jsonl",
        "{inputs}/a.jsonl, line 1: half of a surrogate pair at character 1",
        "leave that line out",
        file("a.jsonl", b'{"text": "x\\ud800"}'),
    ),
    "parquet that is none": BadInput(
        f"{CALIBRATE}a.parquet",
        "{inputs}/a.parquet is not a readable parquet file",
        "parquet",
        file("a.parquet", b"PAR1 nothing PAR1"),
    ),
    "ending that nobody knows": BadInput(
        "eval {model} --data {inputs}/a.docx",
        "{inputs}/a.docx has an unknown ending",
        "expected .txt, .jsonl, .parquet",
        file("a.docx", b"x"),
    ),
    "text that is not there": BadInput(
        "sweep {model} --sparsity 0.4 --out {out} --eval {inputs}/absent.txt --data {text}",
        "{inputs}/absent.txt is neither a file nor a known text",
        "known are: ",
    ),
    "text to measure on that is not there": BadInput(
        "prune no-model --sparsity 0.4 --out {out} --eval {inputs}/absent.txt",
        "{inputs}/absent.txt is neither a file nor a known text",
        "did you mean {inputs}/absent.jsonl?",
        file("absent.jsonl", b'{"text": "here"}'),
    ),
    "BOS that a tokenizer does not have": BadInput(
        f"{PRUNE} {{text}} --bos yes",
        "--bos yes needs a tokenizer with a BOS token",
        "this one has none",
        lambda place: without_bos(place.model),
    ),
    "text of the calibration that is not there, in a sweep": BadInput(
        "sweep {model} --sparsity 0.4 --out {out} --eval {text} --windows 1 --seqlen 32 "
        "--data {inputs}/absent.txt",
        "{inputs}/absent.txt is neither a file nor a known text",
        "known are: ",
    ),
}

TOKENIZERS: Table = {
    "tokenizer of another model": BadInput(
        f"{PRUNE} {{text}}",
        "but {model} has a vocabulary of 320",
        "use the model's own tokenizer",
        lambda place: larger_vocabulary(place.model),
    ),
    "tokenizer of another model, to train": BadInput(
        "recover {pruned} --teacher none --steps 1 --seqlen 32 --out {out} --data {text}",
        "but {pruned} has a vocabulary of 320",
        "use the model's own tokenizer",
        lambda place: larger_vocabulary(place.pruned),
    ),
    "tokenizer that is damaged": BadInput(
        "eval {model} --windows 1 --seqlen 32 --data {text}",
        "{model} carries no usable tokenizer",
        "tokenizer.json",
        lambda place: (place.model / "tokenizer.json").write_text("{"),
    ),
}


def gguf(counts: bytes, rest: bytes = b"") -> Callable[[Place], object]:
    return file("a.gguf", b"GGUF" + struct.pack("<I", 3) + counts + rest)


KEY = struct.pack("<Q", 1) + b"k"

GGUF: Table = {
    "gguf with another magic": BadInput(
        INSPECT, "it does not begin with GGUF", AGAIN, file("a.gguf", b"GGML" * 9)
    ),
    "gguf of another version": BadInput(
        INSPECT, "it has version 77", AGAIN, file("a.gguf", b"GGUF" + struct.pack("<IQQ", 77, 0, 0))
    ),
    "gguf that ends in its header": BadInput(
        "export {inputs}/a.gguf --to vllm --out {out}",
        "{inputs}/a.gguf is not a readable GGUF file",
        AGAIN,
        gguf(struct.pack("<QQ", 5, 5)),
    ),
    "gguf with an endless list": BadInput(
        "calibrate {inputs}/a.gguf --out {out} --data {text}",
        "its header reaches beyond its",
        AGAIN,
        gguf(struct.pack("<QQ", 0, 1), KEY + struct.pack("<IIQ", 9, 0, 1 << 60)),
    ),
    "gguf with endlessly many tensors": BadInput(
        INSPECT, "its header reaches beyond its", AGAIN, gguf(struct.pack("<QQ", 1 << 60, 0))
    ),
    "gguf without tensors": BadInput(
        INSPECT, "{inputs}/a.gguf holds no weight matrices", "safetensors", gguf(bytes(16))
    ),
}

CASES: Table = {**TEXTS, **TOKENIZERS, **GGUF}


@pytest.mark.parametrize("name", CASES)
def test_refused(refused: Callable[[BadInput], None], name: str) -> None:
    refused(CASES[name])
