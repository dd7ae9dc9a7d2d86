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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cfsp.settings import UNIT_PARTS, Part

MAX_BLOCKS = 1 << 16
_MAX_WIDTH = 1 << 24
_MAX_EXPERTS = 1 << 12
_PATH = re.compile(r"[\w.]{0,200}")


@dataclass(frozen=True)
class UnitPlan:
    """What happens to one unit.

    Attributes:
        block: index of its block.
        width: channels of an FFN before.
        kept: indices of the channels that stay, ascending; channel i of expert e is
            e * width + i. None of an attention that goes whole, or of a removed block.
        distance: the block's coarse distance.
        importance: its normalised importance, in (0, 1]; 0 of what goes whole.
        ffns: number of FFNs: 1, or the number of experts.
        few_tokens: expert -> calibration tokens that it saw, of those that saw too few to be
            scored by: their channels are scored by their weights alone, and whether they go whole
            is decided by what these few tokens say.
        path: dotted path from the block to the unit's module; empty in a model that has one unit
            in every block.
        cost: parameters that a channel of all its FFNs owns, relative to other units; 1 where all
            units' channels own as many.
        part: what it is of: `ffn`, or `kv`, whose channels are KV groups.
        lost_output: the share of what all its experts add that those add which go whole.
    """

    block: int
    width: int
    kept: tuple[int, ...]
    distance: float
    importance: float
    ffns: int = 1
    few_tokens: Mapping[int, int] = field(default_factory=dict)
    path: str = ""
    cost: int = 1
    part: Part = "ffn"
    lost_output: float = 0.0

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
        if ffn not in self.kept_ffns:
            return []
        start = self.kept_ffns.index(ffn) * self.kept_width
        return [
            channel - ffn * self.width for channel in self.kept[start : start + self.kept_width]
        ]

    def to_json(self, *, is_placed: bool) -> dict[str, Any]:
        """Return it as JSON types; where it lies only if blocks have none, or several."""
        return {
            **({"block": self.block, "path": self.path} if is_placed else {}),
            "width": self.width,
            "kept_width": self.kept_width,
            "distance": self.distance,
            "importance": self.importance,
            **_rare(self),
            "kept": _mask_text(self.kept, self.ffns * self.width),
        }


def few_experts(block: int, path: str, few_tokens: Mapping[int, int]) -> list[dict[str, Any]]:
    """Return the experts of a unit that saw few tokens as JSON types; the path where it has one."""
    place = {"block": block, **({"path": path} if path else {})}
    return [{**place, "expert": expert, "tokens": seen} for expert, seen in few_tokens.items()]


def _mask_text(kept: Sequence[int], width: int) -> str:
    mask_F = np.zeros(width, dtype=bool)
    mask_F[list(kept)] = True
    return base64.b64encode(np.packbits(mask_F, bitorder="little").tobytes()).decode()


def _rare(unit: UnitPlan) -> dict[str, Any]:
    """Return what is written of a unit only where it differs from what most are."""
    fields: dict[str, Any] = {"experts": unit.ffns} if unit.ffns > 1 else {}
    if unit.loses_experts:
        fields |= {"kept_experts": len(unit.kept_ffns), "lost_output": unit.lost_output}
    if unit.part != "ffn":
        fields["part"] = unit.part
    if unit.cost > 1:
        fields["cost"] = unit.cost
    if unit.few_tokens:
        fields["few_tokens"] = {str(expert): seen for expert, seen in unit.few_tokens.items()}
    return fields


def unit_from_json(entry: dict[str, Any], index: int, removed: Collection[int]) -> UnitPlan:
    """Return the unit that `UnitPlan.to_json` described.

    Args:
        entry: what it returned.
        index: of the unit in the plan, and of its block where no other is said.
        removed: blocks that go whole.

    Raises:
        ValueError: it is damaged.
        KeyError: likewise.
    """
    width, ffns = entry["width"], entry.get("experts", 1)
    if not isinstance(width, int) or not 0 < width <= _MAX_WIDTH:
        raise ValueError(f"a block has the impossible width {width}")
    if not isinstance(ffns, int) or not 0 < ffns <= _MAX_EXPERTS:
        raise ValueError(f"a block has the impossible number of experts {ffns}")
    total = ffns * width
    try:
        packed = np.frombuffer(base64.b64decode(entry["kept"], validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise ValueError(f"kept channels are not base64: {error}") from error
    mask = np.unpackbits(packed, bitorder="little")
    if len(mask) < total or len(mask) - total >= 8 or mask[total:].any():
        raise ValueError(f"kept channels do not fit a width of {width}")
    is_removed = entry.get("block", index) in removed
    kept_E = mask[:total].reshape(ffns, width).sum(axis=1, dtype=int)
    experts = entry.get("kept_experts", ffns)
    # An attention may go whole, an FFN only with its block.
    may_go = is_removed or entry.get("part") == "kv"
    for kept in set(kept_E.tolist()) - ({0} if experts < ffns else set()):
        if (is_removed if kept else not may_go) or kept != entry["kept_width"]:
            raise ValueError(f"{kept} channels are kept, {entry['kept_width']} are announced")
    if not (may_go and entry["kept_width"] == 0) and np.count_nonzero(kept_E) != experts:
        raise ValueError(f"{np.count_nonzero(kept_E)} experts are kept, {experts} are announced")
    lost_output = float(entry.get("lost_output", 0.0))
    if not 0 <= lost_output <= 1:
        raise ValueError(f"a block's experts that go added {lost_output} of what all added")
    distance, importance = float(entry["distance"]), float(entry["importance"])
    if not math.isfinite(distance) or not math.isfinite(importance):
        raise ValueError(f"a block has the distance {distance} and the importance {importance}")
    few = {int(expert): int(seen) for expert, seen in dict(entry.get("few_tokens", {})).items()}
    block, path, cost = entry.get("block", index), entry.get("path", ""), entry.get("cost", 1)
    if type(block) is not int or not 0 <= block <= MAX_BLOCKS:
        raise ValueError(f"an FFN has the impossible block {block!r}")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ValueError(f"an FFN of block {block} has the impossible path {path!r}")
    part = entry.get("part", "ffn")
    if part not in UNIT_PARTS:
        raise ValueError(f"a unit of block {block} is of the impossible part {part!r}")
    if type(cost) is not int or cost < 1:
        raise ValueError(f"an FFN of block {block} has the impossible cost {cost!r}")
    return UnitPlan(
        block=block,
        width=width,
        kept=tuple(np.flatnonzero(mask).tolist()),
        distance=distance,
        importance=importance,
        ffns=ffns,
        few_tokens=few,
        path=path,
        cost=cost,
        part=part,
        lost_output=lost_output,
    )
