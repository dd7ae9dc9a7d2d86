"""The fuzzed readers on a small corpus, without a fuzzer: seeds, and what was found.

Mutations are in test_trust.py.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from targets import TARGETS, read_once

EVERY = pytest.mark.parametrize("name", TARGETS)


@EVERY
def test_seeds_are_accepted(name):
    for seed in TARGETS[name].seeds():
        assert read_once(TARGETS[name], seed)


@EVERY
def test_truncated_seeds_are_refused(name):
    for seed in TARGETS[name].seeds():
        for length in range(0, len(seed) - 64, 23):
            assert not read_once(TARGETS[name], seed[:length])


# What fuzzing found.


def spoilt(name: str, number: int, spoil: Callable[[Any], None]) -> bytes:
    document = json.loads(TARGETS[name].seeds()[number])
    spoil(document)
    return json.dumps(document).encode()


def weight(**changes: Any) -> Callable[[Any], object]:
    return lambda checkpoint: checkpoint["header"]["weight"].update(changes)


FOUND: dict[str, tuple[str, int, Callable[[Any], object]]] = {
    "a version of two lines": ("plan", 0, lambda plan: plan.update(plan_version="a\nb")),
    "a dtype that is a list": ("checkpoint", 1, weight(dtype=["F32"])),
    "a shape whose product cannot be printed": ("checkpoint", 1, weight(shape=[10**400] * 20)),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_refused(case):
    name, number, spoil = FOUND[case]
    assert not read_once(TARGETS[name], spoilt(name, number, spoil))
