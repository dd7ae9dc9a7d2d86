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
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import torch  # noqa: F401  not instrumented: it is not what is fuzzed
import transformers  # noqa: F401

with atheris.instrument_imports(include=["cfsp"]):
    from targets import TARGETS, read_once

# Values that parsers get wrong.
_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 8, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "../x", "/x", "a\x00b", "a\nb", "\ud800",
    "F32", "F8_E4M3", "AAAA", "=", [], {}, [0], [[]], {"": 0}, [0, 0], [2**62, 2**62],
]  # fmt: skip


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
    if generator.random() < 0.5:
        try:
            changed = change_value(json.loads(data), generator)
            return json.dumps(changed).encode()[:max_size]
        except (ValueError, RecursionError):
            pass
    return atheris.Mutate(data, max_size)


def change_value(document: Any, generator: random.Random) -> Any:
    """Return a JSON document with one value replaced, left out or moved elsewhere."""
    places = list(places_in(document))
    if not places:
        return generator.choice(_ODD)
    where, key = generator.choice(places)
    action = generator.randrange(4)
    if action == 0:
        del where[key]
    elif action == 1 and isinstance(where[key], (int, float)):
        where[key] += generator.choice([-1, 1, 0.5, 1 << 20])
    elif action == 2:
        other, other_key = generator.choice(places)
        where[key] = json.loads(json.dumps(other[other_key]))
    else:
        where[key] = generator.choice(_ODD)
    return document


def places_in(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON document with every key in it."""
    if isinstance(document, dict | list):
        keys = list(document) if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield document, key
            yield from places_in(document[key])


if __name__ == "__main__":
    main()
