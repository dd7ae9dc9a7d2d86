"""Flags and numbers that no command can obey."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bad_inputs.catalogue import (
    CALIBRATE,
    EVAL,
    PRUNE,
    PRUNE_TEXT,
    RECOVER,
    TEXT,
    BadInput,
    Table,
    rows,
)

SEE = "see: cfsp prune --help"
BENCH = "bench --shape llama-2-7b --blocks 1"

FLAGS = rows(
    (f"{PRUNE} --sparse 0.5", "unknown argument --sparse", SEE),
    ("families --all", "unknown argument --all", "see: cfsp families --help"),
    (f"{PRUNE} --channel-metric best", "found 'best'", SEE),
    (
        f"{PRUNE} --parts ffn,bloks",
        "--parts must be of ffn, kv, attention, blocks, experts, found 'bloks'",
        "; did you mean blocks?",
    ),
    (f"{PRUNE} --effort fast --repair ridge", "--effort fast is --repair none", "give one of"),
    (f"{PRUNE} --plan p", "--plan and --sparsity exclude each other", "a plan has its sparsity"),
    (
        "prune {model} --out {out} --plan p --statistics s",
        "--plan and --statistics exclude each other",
        "a plan is made already",
    ),
    (f"prune {{model}} --out {{out}} --sparsity 0.95 {TEXT}", "cannot", "between 0 and 66.7%"),
    (f"{PRUNE} --samples many", "invalid int value: 'many'", SEE),
    (
        "recover {pruned} --out {out}",
        "one of the arguments --max-minutes --steps --epochs is required",
        "--help",
    ),
    ("prune {model} --sparsity 0.2", "found none", "expected --out, the directory to write into"),
    ("export {model} --out {out}", "the following arguments are required: --to", "--help"),
    ("verify {model}", "{model} has no cfsp.json", "cfsp did not write it"),
    ("inspect {inputs}/absent", "{inputs}/absent does not exist", "give a directory"),
    ("bench {model} --shape llama-2-7b", "expected models or a --shape", "and not both"),
    ("eval {model}", "found none", "expected --data, --tasks, --answers or several"),
)

NUMBERS = rows(
    (f"{CALIBRATE} --seed {10**30}", f"found {10**30}", "--seed must be in [0, 2^63)"),
    (f"{RECOVER} --seed -1", "found -1", "--seed must be in [0, 2^32)"),
    (
        f"calibrate {{model}} --out {{out}} --data {{text}} --seqlen {10**30}",
        f"found {10**30}",
        "--seqlen must be at most",
    ),
    (
        f"calibrate {{model}} --out {{out}} --data {{text}} --samples {10**30}",
        f"found {10**30}",
        "--samples must be at most",
    ),
    (
        f"eval {{model}} --data {{text}} --seqlen {10**30}",
        f"found {10**30}",
        "expected windows of 2",
    ),
    (f"{PRUNE_TEXT} --eval {{text}} --windows 0", "found 0", "expected at least 1 window"),
    (f"{CALIBRATE} --batch-windows 0", "found 0", "--batch-windows must be at least 1"),
    (f"{CALIBRATE} --memory-budget 1e999", "found '1e999'", "expected a size such as 2GB"),
    (f"{CALIBRATE} --process-timeout nan", "found nan", "--process-timeout must be positive"),
    (f"{CALIBRATE} --device meta", "the device 'meta'", "choose another --device"),
    (f"{EVAL} --device nonsense", "the device 'nonsense'", "choose another --device"),
    (
        "plan {model} --statistics {statistics} --sparsity 1.0 --out {out}",
        "found 1.0",
        "sparsity must be in [0, 1)",
    ),
    ("demo --sparsity 2", "found 2.0", "sparsity must be in [0, 1)"),
    (f"{PRUNE_TEXT} --multiple 0", "found 0", "multiple must be at least 1"),
    (f"{PRUNE_TEXT} --multiple {10**30}", f"found {10**30}", "--multiple must be at most 96"),
    (f"{PRUNE_TEXT} --multiple many", "--multiple: expected a number or auto", "found 'many'"),
    (
        f"{PRUNE_TEXT} --widths equal --set block_metric=angular",
        "block_metric=angular would do nothing",
        "give one of the two",
    ),
    (
        "recover {pruned} --data {text} --out {out} --max-minutes nan",
        "found nan",
        "the length of training must be positive",
    ),
    (f"{RECOVER} --steps 0", "found 0", "the length of training must be positive"),
    (f"{RECOVER} --learning-rate nan", "found nan", "--learning-rate must be positive"),
    (f"{RECOVER} --rank nan", "found nan", "--rank must be at least 1"),
    (
        f"sweep {{model}} --sparsity nan --eval {{text}} --out {{out}} {TEXT}",
        "found nan",
        "sparsity must be in [0, 1)",
    ),
    (f"{BENCH} --prompt 0", "found 0", "--prompt must be at least 1"),
    ("bench --shape llama-2-7b --blocks -3", "found -3", "--blocks must be at least 1"),
    ("bench --shape llama-9", "no shape 'llama-9' is known", "known are: "),
    (f"{BENCH} --rounds 0", "found 0", "at least 1 round"),
    ("eval {model} --tasks piqa --limit 0", "found 0", "--limit must be at least 1"),
    (
        f"sweep {{model}} --sparsity 0.4 --eval {{text}} --out {{out}} {TEXT} --set limit=4",
        "--limit",
        "need --tasks",
    ),
    ("export {model} --to vllm --type f16 --out {out}", "--type belongs to", "keeps the"),
)

CASES: Table = {**FLAGS, **NUMBERS}


@pytest.mark.parametrize("name", CASES)
def test_refused(refused: Callable[[BadInput], None], name: str) -> None:
    refused(CASES[name])
