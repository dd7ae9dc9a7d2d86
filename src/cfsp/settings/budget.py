"""How much is removed, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings.goals import (
    GOALS,
    Goal,
    MaxLossIncrease,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
    flag_of_goal,
)
from cfsp.settings.options import flag_of, fraction, number_or_auto, option, options_of

Part = Literal["ffn", "kv", "attention", "blocks", "experts"]
PARTS: tuple[Part, ...] = get_args(Part)
# Those that are units of a block, which get narrower.
UNIT_PARTS: tuple[Part, ...] = ("ffn", "kv")
# Those that are proved when a model is opened; of blocks it depends on which go.
PROVED_PARTS: tuple[Part, ...] = (*UNIT_PARTS, "attention", "experts")
DEFAULT_PARTS: tuple[Part, ...] = ("ffn",)
# Those that go whole or stay, one by one.
WholePart = Literal["attention", "blocks"]
WHOLE_PARTS: tuple[WholePart, ...] = get_args(WholePart)
# The field of a budget that says how many of a part go whole.
NUMBERS: dict[Part, str] = {
    "blocks": "remove_blocks",
    "attention": "remove_attentions",
    "experts": "remove_experts",
}

# By which parts each goal can be met, and why by no others.
_MET_BY: dict[type[Goal], tuple[tuple[Part, ...], str]] = {
    TargetParameters: (PARTS, ""),
    TargetKVCache: (
        ("kv", "attention"),
        "removes KV groups (the default), whole attentions or both, and nothing else",
    ),
    TargetSpeedup: (
        ("ffn", "kv", "attention", "blocks"),
        "is not for --parts experts: every token passes as many experts as before",
    ),
    MaxLossIncrease: (
        UNIT_PARTS,
        "is met by FFN channels and KV groups alone, which are masked to measure it",
    ),
}


def can_be_met(goal: type[Goal], parts: Sequence[Part]) -> bool:
    """Return whether these parts may go for a goal."""
    return {*parts} <= {*_MET_BY[goal][0]}


# How much of the blocks, or attentions, a calibration measures the removal of.
MOST_REMOVED = 0.5


def unit_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return of which parts a model's units are needed: an attention is a unit of KV groups."""
    needed = {"kv" if part == "attention" else part for part in parts}
    return tuple(part for part in UNIT_PARTS if part in needed)


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts that a text like `blocks,ffn` names; `Budget` checks them."""
    return tuple(part.strip() for part in text.split(","))


BudgetOf = Literal["ffn", "model"]
BUDGET_OF: tuple[BudgetOf, ...] = get_args(BudgetOf)

Widths = Literal["importance", "equal"]
WIDTHS: tuple[Widths, ...] = get_args(Widths)

# (least width of the FFN, multiple), widest first. llama.cpp's K-quants work on rows of 256, and
# tensor cores on tiles of 128 or 64, as bitsandbytes' NF4 does; docs/RESULTS.md has the
# measurements. Where 256 would be a coarse step, a smaller one is taken: widths that follow
# importance matter more there.
_MULTIPLES = ((8192, 256), (4096, 128), (1024, 64))
MULTIPLE_OF_NARROW = 32
# Multiple -> who works best on widths that are multiples of it; docs/quantise.md.
_WANTED = {
    256: "K-quants and the export for mlx-lm",
    128: "4-bit Marlin kernels",
    64: "nf4 and tensor cores",
    32: "Q8_0 and Q4_0",
}


def multiple_in_words(multiple: int) -> str:
    """Return for whom widths in these multiples are right, and who wants larger ones."""
    right = [f"{who} ({of})" for of, who in _WANTED.items() if multiple % of == 0]
    wrong = [f"{who} ({of})" for of, who in _WANTED.items() if multiple % of]
    text = f"widths are multiples of {multiple}"
    if right:
        text += f", right for {', '.join(right)}"
    if wrong:
        text += f"; --set multiple=N makes them fit {', '.join(wrong)}"
    return text


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Attributes:
        sparsity: fraction to remove, in [0, 1).
        of: `ffn`, the fraction of all FFN channels (the paper's sparsity), counted by their
            parameters where some own more than others, or `model`, the fraction of all parameters.
            With `kv` the first is the fraction of what channels and KV groups own.
        multiple: FFN widths become multiples of this; None for 256 where the FFN is at least 8192
            wide, 128 from 4096 on, 64 from 1024 on, else 32, for each kind of FFN by itself.
        parts: what may go, in the order of `PARTS` however they are given: `ffn`, channels of
            FFNs; `kv`, KV groups; `attention`, whole attentions; `blocks`, whole decoder blocks;
            `experts`, whole routed experts, equally many of every block. With attentions the
            sparsity is the share of their parameters, and of those that the channels of other parts
            own; with blocks, whatever else may go, that of the parameters of all blocks; with
            experts alone their share.
        widths: `importance`, blocks keep channels by their importance, or `equal`, all FFNs of a
            kind that are equally wide stay so, which stock configs can say.
        remove_blocks: how many blocks go; None for as many as the sparsity says or, if channels
            may go too, as measures best (`cfsp.whole_model.removal_trial`). With a number the
            sparsity is of the channels, in the blocks that stay.
        remove_attentions: the same of attentions; where blocks may go too, of those that stay, and
            either both numbers are given or none.
        remove_experts: how many of the routed experts of each block go; None for as many as the
            sparsity says or, if other parts may go too, as measures best. With a number the
            sparsity is of what the other parts own beside these experts, else of what all own.
            Whoever says how many blocks or attentions go says it of experts as well.

    Raises:
        UsageError: a value is out of its range.
    """

    sparsity: float = option(
        0.0,
        "fraction to remove, such as 0.2 or 20%: of the FFN channels, or what --parts says",
        kind=fraction,
        metavar="P",
        default="",
    )
    of: BudgetOf = option(
        "ffn",
        "whether --sparsity is a fraction of the FFN channels or of all parameters of the model",
        choices=BUDGET_OF,
        advanced=True,
    )
    multiple: int | None = option(
        None,
        "FFN widths become multiples of N, or auto",
        kind=number_or_auto,
        metavar="N",
        default="auto: 256; 128 below 8192 channels; 64 below 4096; 32 below 1024",
        advanced=True,
    )
    widths: Widths = option(
        "importance",
        "blocks keep channels by their importance, or all equally many: then a stock config "
        "describes the result, and software runs it that knows one width only",
        choices=WIDTHS,
        advanced=True,
    )
    parts: tuple[Part, ...] = option(
        DEFAULT_PARTS,
        "what may go, with commas between several: ffn (channels), kv (KV groups: a head of keys "
        "and values with its query heads), attention (whole attentions), blocks (whole decoder "
        "blocks), experts (whole routed experts)",
        kind=parse_parts,
        metavar="KIND,...",
        default="ffn",
    )
    remove_blocks: int | None = option(
        None,
        "with --parts blocks: how many blocks go; with --parts blocks,ffn the sparsity is then of "
        "the channels in the others",
        kind=int,
        metavar="N",
        default="as many as --sparsity says, or with other parts as measures best",
        advanced=True,
    )
    remove_attentions: int | None = option(
        None,
        "the same with --parts attention or ffn,attention: how many attentions go",
        kind=int,
        metavar="N",
        default="as many as --sparsity says, or with other parts as measures best",
        advanced=True,
    )
    remove_experts: int | None = option(
        None,
        "with --parts experts: how many routed experts of each block go; the sparsity is then of "
        "what other parts lose beside these",
        kind=int,
        metavar="N",
        default="as many as --sparsity says, or with other parts as measures best",
        advanced=True,
    )

    def __post_init__(self) -> None:
        given = parse_parts(self.parts) if isinstance(self.parts, str) else self.parts
        for part in given:
            if part not in PARTS:
                raise UsageError(
                    f"--parts must be of {', '.join(PARTS)}, found {part!r}"
                    f"{did_you_mean(part, PARTS)}"
                )
        if not given:
            raise UsageError(f"--parts must name what may go: {', '.join(PARTS)}")
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in given))
        flags = {part: _flag_of_number(part) for part in self._numbers}
        for part, count in self._numbers.items():
            if part not in given:
                raise UsageError(f"{flags[part]} belongs to --parts {part} or {part},ffn")
            if count < 0:
                raise UsageError(f"{flags[part]} must be at least 0, found {count}")
        said = next((flag for part, flag in flags.items() if part in WHOLE_PARTS), None)
        if said is not None and self.whole_parts == WHOLE_PARTS and self.remove_whole is None:
            raise UsageError(
                "--parts attention,blocks requires both --remove-blocks and --remove-attentions or "
                f"neither, found {said} alone"
            )
        if said is not None and self.leaves_experts_open:
            raise UsageError(
                f"--parts {','.join(self.parts)} requires --remove-experts beside {said}, or "
                "neither: then both numbers are tried"
            )
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"sparsity must be in [0, 1), such as 0.2, found {self.sparsity}")
        if self.of not in BUDGET_OF:
            raise UsageError(f"a budget is of 'ffn' or of 'model', found {self.of!r}")
        if self.multiple is not None and self.multiple < 1:
            raise UsageError(f"multiple must be at least 1, found {self.multiple}")
        if self.widths not in WIDTHS:
            raise UsageError(f"--widths must be one of {', '.join(WIDTHS)}, found {self.widths!r}")

    def for_goal(self, goal: Goal | None) -> Budget:
        """Return the budget with the parts that a goal is met by.

        Raises:
            UsageError: other parts were asked for, or how many go whole, which the goal says.
        """
        if goal is None:
            return self
        is_said = isinstance(goal, TargetKVCache) or (
            isinstance(goal, TargetSpeedup) and not self.removes_channels
        )
        if is_said and (self.remove_blocks, self.remove_attentions) != (None, None):
            raise UsageError(
                f"{flag_of_goal(type(goal))} says how many go; leave out --remove-blocks and "
                "--remove-attentions"
            )
        if isinstance(goal, TargetKVCache) and self.parts == DEFAULT_PARTS:
            return replace(self, parts=("kv",))
        if not can_be_met(type(goal), self.parts):
            parts, why = _MET_BY[type(goal)]
            others = [flag_of_goal(each) for each in GOALS if can_be_met(each, self.parts)]
            raise UsageError(
                f"{flag_of_goal(type(goal))} {why}; found --parts {','.join(self.parts)}: name of "
                f"{', '.join(parts)} alone, or give {', '.join(others)} or --sparsity"
            )
        return self

    @property
    def removes_experts(self) -> bool:
        """Whether whole routed experts may go."""
        return "experts" in self.parts

    @property
    def removes_blocks(self) -> bool:
        """Whether whole blocks may go."""
        return "blocks" in self.parts

    @property
    def whole_parts(self) -> tuple[WholePart, ...]:
        """What may go whole, one by one; none where nothing may."""
        return tuple(part for part in WHOLE_PARTS if part in self.parts)

    @property
    def remove_whole(self) -> tuple[int, int] | None:
        """How many blocks go and how many attentions of others, where the budget says it."""
        if not self.whole_parts or not {*self.whole_parts} <= self._numbers.keys():
            return None
        return self.remove_blocks or 0, self.remove_attentions or 0

    @property
    def is_said_in_numbers(self) -> bool:
        """Whether numbers of blocks, attentions and experts say all that goes, and no sparsity."""
        return {*self.parts} <= self._numbers.keys()

    @property
    def _numbers(self) -> dict[Part, int]:
        """How many go of those parts of which the budget says it."""
        counts = {part: getattr(self, name) for part, name in NUMBERS.items()}
        return {part: count for part, count in counts.items() if count is not None}

    @property
    def channel_parts(self) -> tuple[Part, ...]:
        """What may lose channels, or KV groups; none where nothing may."""
        return tuple(part for part in UNIT_PARTS if part in self.parts)

    def without_channels(self) -> Budget:
        """Return the same budget where channels of what stays may not go."""
        return replace(self, parts=tuple(part for part in self.parts if part not in UNIT_PARTS))

    @property
    def removes_channels(self) -> bool:
        """Whether channels of blocks may go, or KV groups."""
        return bool(self.channel_parts)

    @property
    def leaves_experts_open(self) -> bool:
        """Whether how many experts go beside other parts is to be found out."""
        return self.removes_experts and self.remove_experts is None and len(self.parts) > 1

    @property
    def leaves_number_open(self) -> bool:
        """Whether how many go whole, and how much of the others, is to be found out."""
        beside_channels = bool(self.whole_parts) and self.removes_channels
        return self.leaves_experts_open or (beside_channels and self.remove_whole is None)

    def multiple_for(self, width_L: Sequence[int]) -> int:
        """Return the multiple that the widths of a model's FFNs of one kind are rounded to."""
        if self.multiple is not None:
            return self.multiple
        widest = max(width_L)
        fitting = (multiple for least, multiple in _MULTIPLES if widest >= least)
        return next(fitting, MULTIPLE_OF_NARROW)


def _flag_of_number(part: Part) -> str:
    """Return the option that says how many of a part go whole."""
    field = NUMBERS[part]
    return flag_of(field, options_of(Budget)[field])
