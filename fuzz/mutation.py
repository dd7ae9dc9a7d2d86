"""Changes of JSON documents that make them lie: a value replaced, left out, or moved elsewhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

# Values that readers get wrong.
_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 8, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "../x", "/x", "a\x00b", "a\nb", "\ud800",
    "F32", "F8_E4M3", "AAAA", "=", [], {}, [0], [[]], {"": 0}, [0, 0], [2**62, 2**62],
]  # fmt: skip


def changed_document(data: bytes, generator: random.Random) -> bytes | None:
    """Return a JSON document with one change; None if the data is no JSON."""
    try:
        document = json.loads(data)
        return json.dumps(_change(document, generator)).encode()
    except (ValueError, OverflowError, RecursionError):
        return None


def _change(document: Any, generator: random.Random) -> Any:
    places = list(_places_in(document))
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


def _places_in(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON document with every key in it."""
    if isinstance(document, dict | list):
        keys = list(document) if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield document, key
            yield from _places_in(document[key])
