"""What a plan says of one unit, as a value and as JSON.

The kept channels are a bit mask, lowest channel first, in base64, so that a plan of a large model
stays below a megabyte. A unit has one FFN, or several of the same width (experts), of which each
keeps as many channels of its own, or none: then it goes whole. The channels of all of them are
numbered through, expert after expert.

Shapes: F FFN channels, E experts.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cfsp.settings import LEAST_WIDTH, UNIT_PARTS, Part

MAX_BLOCKS = 1 << 16
_MAX_WIDTH = 1 << 24
_MAX_EXPERTS = 1 << 12
_PATH = re.compile(r"[\w.]{0,200}")


@dataclass(frozen=True)
class UnitPlan:
    """What happens to one unit."""

    block: int  # index of its block
    width: int  # channels of an FFN before
    # The channels that stay, ascending; channel i of expert e is e * width + i. None of an
    # attention that goes whole, or of a removed block.
    kept: tuple[int, ...]
    distance: float  # coarse, of the block
    importance: float  # normalised, in (0, 1]; 0 of what goes whole
    ffns: int = 1  # or the number of experts
    # Expert -> calibration tokens that it saw, of those that saw too few to be scored by.
    few_tokens: Mapping[int, int] = field(default_factory=dict)
    path: str = ""  # from the block to its module; empty in a model of one unit in every block
    cost: int = 1  # parameters that a channel of all its FFNs owns, relative to other units
    part: Part = "ffn"  # or `kv`, whose channels are KV groups
    lost_output: float = 0.0  # share of what all experts add that those add which go whole

    @property
    def name(self) -> str:
        """The unit in a table: its block, and which of the block's units it is."""
        experts = f" ({self.ffns})" if self.ffns > 1 else ""
        return f"{self.block} {self.path}{experts}" if self.path else str(self.block)

    @cached_property
    def kept_ffns(self) -> list[int]:
        """The FFNs that keep channels, ascending: all, but for experts that go whole."""
        kept: list[int] = np.unique(np.array(self.kept, dtype=np.int64) // self.width).tolist()
        return kept

    @property
    def loses_experts(self) -> bool:
        """Whether some of its experts go whole, and others stay."""
        return 0 < len(self.kept_ffns) < self.ffns

    @property
    def kept_width(self) -> int:
        """Number of channels that each FFN keeps that stays."""
        return len(self.kept) // max(1, len(self.kept_ffns))

    @property
    def kept_share(self) -> float:
        """Share of all its channels that stays."""
        return len(self.kept) / (self.ffns * self.width)

    @property
    def kept_in_words(self) -> str:
        """What stays of it in a table: channels of each FFN, and how many experts if some go."""
        if not self.kept:
            return "removed"
        experts = f" in {len(self.kept_ffns)} experts" if self.loses_experts else ""
        return f"{self.kept_width}{experts}"

    def kept_of(self, ffn: int) -> list[int]:
        """Return the channels that stay in one FFN, numbered within it; none if it goes whole."""
        first, end = (bisect_left(self.kept, start * self.width) for start in (ffn, ffn + 1))
        return [channel - ffn * self.width for channel in self.kept[first:end]]

    def to_json(self, *, is_placed: bool) -> dict[str, Any]:
        """Return it as JSON types; where it lies only if blocks have none, or several."""
        fields: dict[str, Any] = {"block": self.block, "path": self.path} if is_placed else {}
        fields |= {
            "width": self.width,
            "kept_width": self.kept_width,
            "distance": self.distance,
            "importance": self.importance,
        }
        # What differs from most units.
        if self.ffns > 1:
            fields["experts"] = self.ffns
        if self.loses_experts:
            fields |= {"kept_experts": len(self.kept_ffns), "lost_output": self.lost_output}
        if self.part != "ffn":
            fields["part"] = self.part
        if self.cost > 1:
            fields["cost"] = self.cost
        if self.few_tokens:
            fields["few_tokens"] = {str(expert): seen for expert, seen in self.few_tokens.items()}
        mask_F = np.zeros(self.ffns * self.width, dtype=bool)
        mask_F[list(self.kept)] = True
        packed = np.packbits(mask_F, bitorder="little").tobytes()
        return fields | {"kept": base64.b64encode(packed).decode()}


def unit_from_json(entry: dict[str, Any], index: int, removed: Collection[int]) -> UnitPlan:
    """Return the unit that `UnitPlan.to_json` described, of a plan without the removed blocks.

    Its index in the plan is that of its block where no other is said.
    """
    few = dict(entry.get("few_tokens", {}))
    found = UnitPlan(
        block=entry.get("block", index),
        width=entry["width"],
        kept=(),
        distance=float(entry["distance"]),
        importance=float(entry["importance"]),
        ffns=entry.get("experts", 1),
        few_tokens={int(expert): int(seen) for expert, seen in few.items()},
        path=entry.get("path", ""),
        cost=entry.get("cost", 1),
        part=entry.get("part", "ffn"),
        lost_output=float(entry.get("lost_output", 0.0)),
    )
    block, width, ffns, path, cost = found.block, found.width, found.ffns, found.path, found.cost
    sound = {
        f"width {width}": isinstance(width, int) and 0 < width <= _MAX_WIDTH,
        f"number of experts {ffns}": isinstance(ffns, int) and 0 < ffns <= _MAX_EXPERTS,
        f"block {block!r}": type(block) is int and 0 <= block <= MAX_BLOCKS,
        f"path {path!r}": isinstance(path, str) and _PATH.fullmatch(path),
        f"part {found.part!r}": found.part in UNIT_PARTS,
        f"cost {cost!r}": type(cost) is int and cost >= 1,
        f"distance {found.distance}": math.isfinite(found.distance),
        f"importance {found.importance}": math.isfinite(found.importance),
        f"share {found.lost_output} of what experts add": 0 <= found.lost_output <= 1,
    }
    for value, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"a block has the impossible {value}")
    return replace(found, kept=_checked_mask(entry, found, is_removed=block in removed))


def _checked_mask(entry: dict[str, Any], unit: UnitPlan, *, is_removed: bool) -> tuple[int, ...]:
    """Return the channels that stay of a unit, as many in each expert that stays."""
    try:
        packed = np.frombuffer(base64.b64decode(entry["kept"], validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise ValueError(f"kept channels are not base64: {error}") from error
    mask, total = np.unpackbits(packed, bitorder="little"), unit.ffns * unit.width
    if not 0 <= len(mask) - total < 8 or mask[total:].any():
        raise ValueError(f"kept channels do not fit a width of {unit.width}")
    kept_E = mask[:total].reshape(-1, unit.width).sum(axis=1, dtype=int)
    announced, experts = entry["kept_width"], entry.get("kept_experts", len(kept_E))
    may_go = is_removed or not LEAST_WIDTH[unit.part]
    for kept in set(kept_E.tolist()) - ({0} if experts < len(kept_E) else set()):
        if kept != announced or (is_removed if kept else not may_go):
            raise ValueError(f"{kept} channels are kept, {announced} are announced")
    found = np.count_nonzero(kept_E)
    if found != experts and not (may_go and announced == 0):
        raise ValueError(f"{found} experts are kept, {experts} are announced")
    return tuple(np.flatnonzero(mask).tolist())
