"""How much is removed, and of what: a share of one part, or a goal instead of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings.options import (
    Declared,
    advanced_option,
    fraction,
    names_in,
    number_or_auto,
    one_or_several,
    option,
    options_of,
)

Part = Literal["ffn", "kv", "attention", "blocks", "experts"]
PARTS: tuple[Part, ...] = get_args(Part)
# What goes of each.
PART_NOUNS: dict[Part, str] = {
    "ffn": "FFN channels",
    "kv": "KV groups",
    "attention": "attention layers",
    "blocks": "blocks",
    "experts": "experts",
}
# Those that are units of a block, which get narrower.
UNIT_PARTS: tuple[Part, ...] = ("ffn", "kv")
# Of how many channels one keeps at least: an attention may go whole, an FFN only with its block.
LEAST_WIDTH: dict[Part, int] = {"ffn": 1, "kv": 0}
# Those that are proved when a model is opened; of blocks it depends on which go.
PROVED_PARTS: tuple[Part, ...] = (*UNIT_PARTS, "attention", "experts")
DEFAULT_PARTS: tuple[Part, ...] = ("ffn",)
# Those that go whole or stay, one by one.
WholePart = Literal["attention", "blocks"]
WHOLE_PARTS: tuple[WholePart, ...] = get_args(WholePart)
# Those that share no target with others.
_ALONE: tuple[Part, ...] = ("attention", "experts")
# Those of which a number may be said instead of a share.
COUNTED: tuple[Part, ...] = ("attention", "blocks", "experts")

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)


# A fraction that stays.
_kept_fraction = partial(option, kind=fraction, above=0, most=1, metavar="F", default="")


@dataclass(frozen=True)
class TargetParameters(Declared):
    """The goal to keep a fraction of the whole model's parameters.

    Attributes:
        fraction: of all parameters that stays, in (0, 1].
    """

    fraction: float = _kept_fraction(
        1.0,
        "fraction of all parameters that stays; without --parts blocks may go, too",
        flag="target-params",
    )


@dataclass(frozen=True)
class TargetKVCache(Declared):
    """The goal to keep a fraction of the KV cache, by KV groups or attention layers.

    Attributes:
        fraction: of the cache of the longest context that stays at most, in (0, 1].
    """

    fraction: float = _kept_fraction(
        1.0,
        "fraction of the KV cache that stays; KV groups go, with --parts attention whole "
        "attention layers, and nothing else",
        flag="target-kv-cache",
        advanced=True,
    )


@dataclass(frozen=True)
class TargetSpeedup(Declared):
    """The goal to prune as little as makes the model this much faster on this machine.

    Attributes:
        ratio: tokens per second over those of the model as it is, above 1.
        phase: what shall be faster.
    """

    ratio: float = advanced_option(
        2.0,
        "as little of FFN channels, blocks or both as is predicted to make the model X times "
        "faster on this machine, which must be quiet",
        kind=float,
        above=1,
        flag="target-speedup",
        metavar="X",
        default="",
    )
    phase: Phase = advanced_option(
        "decode", "what --target-speedup is about", flag="target-speedup-of", choices=PHASES
    )


@dataclass(frozen=True)
class MaxLossIncrease(Declared):
    """The goal to prune as much as keeps the loss within a bound.

    The bound holds for the pruned model before repair, on text that calibration has not seen.

    Attributes:
        nats: by how much the mean negative log-likelihood of a token may rise.
    """

    nats: float = advanced_option(
        0.1,
        "as much as keeps the loss on held-out text within so many nats per token of the dense "
        "model's, before repair; the model must fit into memory",
        kind=float,
        above=0,
        flag="max-loss-increase",
        metavar="NATS",
        default="",
    )


Goal = TargetParameters | TargetKVCache | TargetSpeedup | MaxLossIncrease
GOALS: tuple[type[Goal], ...] = get_args(Goal)


def flag_of_goal(goal: type[Goal]) -> str:
    """Return the option that asks for a goal: the first; the others belong to it."""
    return next(iter(options_of(goal).values())).typed


# By which parts each goal can be met, and why by no others.
_MET_BY: dict[type[Goal], tuple[tuple[Part, ...], str]] = {
    TargetParameters: (PARTS, ""),
    TargetKVCache: (
        ("kv", "attention"),
        "removes KV groups (the default) or whole attention layers, and nothing else",
    ),
    TargetSpeedup: (
        ("ffn", "blocks"),
        "is predicted for FFN channels and whole blocks alone (for other parts give "
        "--target-params, then time the result with cfsp bench)",
    ),
    MaxLossIncrease: (
        UNIT_PARTS,
        "is met by FFN channels and KV groups alone, which are masked to measure it",
    ),
}


def unit_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return of which parts a model's units are needed: an attention is a unit of KV groups."""
    needed = {"kv" if part == "attention" else part for part in parts}
    return tuple(part for part in UNIT_PARTS if part in needed)


def parts_in_words(parts: Iterable[Part]) -> str:
    """Return what goes of some parts."""
    return " and ".join(PART_NOUNS[part] for part in parts)


def _names(given: Any) -> tuple[Any, ...]:
    """Return names that are given as on a command line, or each for itself."""
    return names_in(given) if isinstance(given, str) else one_or_several(given)


Widths = Literal["importance", "equal"]
WIDTHS: tuple[Widths, ...] = get_args(Widths)

# (least width of the FFN, multiple), widest first. llama.cpp's K-quants work on rows of 256, and
# tensor cores on tiles of 128 or 64, as bitsandbytes' NF4 does; docs/RESULTS.md has the
# measurements. Where 256 would be a coarse step, a smaller one is taken: widths that follow
# importance matter more there.
_MULTIPLES = ((8192, 256), (4096, 128), (1024, 64), (0, 32))


@dataclass(frozen=True)
class Budget(Declared):
    """What may go, and how much of it where that is one part.

    Several parts have one target that all pay into, a goal. A share of FFN channels
    (the paper's sparsity), KV groups, blocks and attention layers counts by their parameters, one
    of experts by their number: as many go of every block, and nothing else.
    """

    sparsity: float = option(
        0.0,
        "share that goes of what --parts names, such as 0.2 or 20%",
        kind=fraction,
        metavar="P",
        default="",
    )
    multiple: int | None = advanced_option(
        None,
        "FFN widths become multiples of N, or auto",
        kind=number_or_auto,
        least=1,
        metavar="N",
        default="auto: 256; 128 below 8192 channels; 64 below 4096; 32 below 1024",
    )
    widths: Widths = advanced_option(
        "importance",
        "blocks keep channels by their importance, or all the same share: blocks of one width stay "
        "so, which a stock config describes and software runs that knows one width only",
        choices=WIDTHS,
    )
    parts: tuple[Part, ...] = option(
        DEFAULT_PARTS,
        "what may go: ffn (channels), kv (KV groups), blocks, or several of these for one target; "
        "attention (layers) or experts alone",
        kind=names_in,
        metavar="KIND,...",
        default="ffn",
    )
    keep: tuple[str, ...] = option(
        (),
        "blocks that stay whole, and modules by name: 0,1,29 or 'model.layers.*.self_attn'",
        kind=names_in,
        metavar="WHAT,...",
    )
    remove: int | None = advanced_option(
        None,
        "with --parts attention, blocks or experts: how many of it go, instead of a share; experts "
        "of each block",
        kind=int,
        least=0,
        default="as many as --sparsity says",
    )

    def __post_init__(self) -> None:
        given = _names(self.parts)
        for part in given:
            if part not in PARTS:
                raise UsageError(
                    f"--parts must be of {', '.join(PARTS)}, found {part!r}"
                    f"{did_you_mean(part, PARTS)}"
                )
        if not given:
            raise UsageError(f"--parts must name what may go: {', '.join(PARTS)}")
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in given))
        alone = next((part for part in _ALONE if part in self.parts), None)
        if alone is not None and len(self.parts) > 1:
            raise UsageError(
                f"whole {PART_NOUNS[alone]} go alone, found --parts {','.join(self.parts)}: give "
                f"--parts {alone}, then prune the result again"
            )
        keep = () if self.keep is None else _names(self.keep)
        object.__setattr__(self, "keep", tuple(map(str, keep)))
        if self.keep and "experts" in self.parts:
            raise UsageError(
                "--keep is not for --parts experts: equally many go of every block, so that a "
                "stock config says it"
            )
        if self.remove is not None:
            if self.parts not in [(part,) for part in COUNTED]:
                raise UsageError(
                    f"--remove belongs to one of --parts {', '.join(COUNTED)} alone, found --parts "
                    f"{','.join(self.parts)}: prune one part, then the other of the result, or "
                    "give all of them one --target-params"
                )
            if self.sparsity:
                raise UsageError("--remove and --sparsity both say how much goes; give one of them")
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"sparsity must be in [0, 1), such as 0.2, found {self.sparsity}")

    def for_goal(self, goal: Goal | None, *, leaves_parts_open: bool = False) -> Budget:
        """Return the budget with the parts that a goal is met by; refuse what contradicts it.

        Where nobody said which parts, those of the goal are taken.
        """
        targets = [flag_of_goal(each) for each in GOALS if {*self.parts} <= {*_MET_BY[each][0]}]
        if goal is None:
            if len(self.parts) > 1:
                raise UsageError(
                    "--sparsity is the share of one part that goes, found --parts "
                    f"{','.join(self.parts)}: several share one target, {' or '.join(targets)}; "
                    "--target-params 0.8 keeps 80% of all parameters"
                )
            return self
        flag = flag_of_goal(type(goal))
        if self.remove is not None:
            raise UsageError(f"{flag} says how many go; leave out --remove")
        if isinstance(goal, TargetKVCache) and leaves_parts_open:
            return replace(self, parts=("kv",))
        if flag not in targets:
            parts, why = _MET_BY[type(goal)]
            together = [part for part in parts if part not in _ALONE]
            targets += ["--sparsity"] if len(self.parts) == 1 else []
            raise UsageError(
                f"{flag} {why}; found --parts {','.join(self.parts)}: name of "
                f"{', '.join(together)} alone, or give {' or '.join(targets)}"
            )
        return self

    @property
    def whole_part(self) -> WholePart | None:
        """What may go whole, one by one; None where nothing may."""
        return next((part for part in WHOLE_PARTS if part in self.parts), None)

    @property
    def channel_parts(self) -> tuple[Part, ...]:
        """What may lose channels, or KV groups; none where nothing may."""
        return tuple(part for part in UNIT_PARTS if part in self.parts)

    @property
    def compares(self) -> bool:
        """Whether several plans meet a target: blocks go beside channels."""
        return bool(self.whole_part and self.channel_parts)

    def multiple_for(self, width_L: Sequence[int]) -> int:
        """Return the multiple that the widths of a model's FFNs of one kind are rounded to."""
        if self.multiple is not None:
            return self.multiple
        widest = max(width_L)
        return next(multiple for least, multiple in _MULTIPLES if widest >= least)
