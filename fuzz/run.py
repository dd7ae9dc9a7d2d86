"""Fuzz one reader for a while.

    pip install '.[fuzz]'
    python fuzz/run.py plan --seconds 180
    python fuzz/run.py plan --input crash-...    # what was found, again

Half of the mutations are the fuzzer's own, on bytes; the others change values of a JSON document.
The exit status is not 0 if anything but a `CfspError` came out; the input is then in the current
directory.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import atheris
import torch  # noqa: F401  not instrumented: it is not what is fuzzed
import transformers  # noqa: F401

from mutation import changed_document

with atheris.instrument_imports(include=["cfsp"]):
    from targets import TARGETS, read_once


def main() -> None:
    """Fuzz, or read one input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="read this one only")
    args = parser.parse_args()
    target = TARGETS[args.target]
    if args.input:
        print("accepted" if read_once(target, args.input.read_bytes()) else "refused")
        return
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        atheris.Setup(
            [
                sys.argv[0],
                f"-max_total_time={args.seconds}",
                f"-seed={args.seed}",
                "-max_len=4096",
                "-rss_limit_mb=2048",
                "-timeout=20",
                "-print_final_stats=1",
                corpus,
            ],
            lambda data: read_once(target, data),
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes, or a value of a JSON document."""
    generator = random.Random(seed)
    changed = changed_document(data, generator) if generator.random() < 0.5 else None
    return changed[:max_size] if changed is not None else atheris.Mutate(data, max_size)


if __name__ == "__main__":
    main()
