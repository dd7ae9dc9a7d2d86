"""Every choice that a user has, with its default and its help, once; the CLI is made from it.

    PruneSettings(Budget(0.2), text=CalibrationText(("wikitext2", "c4")))

A field that is declared with `option` is a command-line option: its flag, its type, its default and
its help are written here and nowhere else. Advanced ones are what only a researcher sets: the CLI
takes them as `--set name=value`. Importing this module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from cfsp.errors import TextError, UsageError, did_you_mean

T = TypeVar("T")

LONGEST_WINDOW = 1 << 24
DEFAULT_EVALUATION_WINDOWS = 12
MOST_WINDOWS = 1 << 32

DEFAULT_TEXT = "mixed"
DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 1024
# What `--data` calls text that the model writes itself.
OWN_TEXT = "self"


@dataclass(frozen=True)
class Option:
    """How a field is set on a command line.

    Attributes:
        help: what it does; the CLI adds the default.
        kind: makes the value of what was typed.
        flag: `--flag`; None for the field's name.
        choices: the only values there are.
        metavar: what the help calls the value.
        default: what the help calls the default, where its value does not say it; empty for none.
        repeats: whether it is given once for each of several values.
        switch: whether to give it is to set it.
        advanced: whether only a researcher sets it.
    """

    help: str
    kind: Callable[[str], Any] = str
    flag: str | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None
    repeats: bool = False
    switch: bool = False
    advanced: bool = False


def option(value: Any, help: str, **facts: Any) -> Any:
    """Return a dataclass field that is an option; see `Option`."""
    return field(default=value, metadata={"option": Option(help, **facts)})


def options_of(settings: type[Any]) -> dict[str, Option]:
    """Return the options of a class of settings, by field, each with its default in words."""
    found = {}
    for each in fields(settings):
        if (known := each.metadata.get("option")) is not None:
            default = str(each.default) if known.default is None else known.default
            found[each.name] = replace(known, default=default)
    return found


def name_of(field: str, known: Option) -> str:
    """Return what an option is called in Python and by `--set`."""
    return (known.flag or field).replace("-", "_")


def from_names(settings: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Return settings with some values by the names of their options; the rest has its default.

    Args:
        settings: a class of settings.
        values: by name; those that belong to other classes are passed over.
        others: values of fields that are no options, or were decided otherwise.
    """
    found = {}
    for each, known in options_of(settings).items():
        if (name := name_of(each, known)) in values:
            value = values[name]
            found[each] = tuple(value) if known.repeats else value
    return settings(**{**found, **others})


def check_names(given: Iterable[str], *known: type[Any]) -> None:
    """Check that every keyword is the name of an option of some class of settings.

    Raises:
        UsageError: one is not.
    """
    names = [name_of(each, option) for cls in known for each, option in options_of(cls).items()]
    for name in given:
        if name not in names:
            raise UsageError(
                f"unknown argument {name}{did_you_mean(name, names)}; known are: {', '.join(names)}"
            )


def fraction(text: str) -> float:
    """Return the number that `0.2` or `20%` means."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


# How much to remove, and of what.

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
    256: "K-quants and the export for SGLang, TensorRT-LLM and mlx-lm",
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
        text += f"; --multiple is for who wants others: {', '.join(wrong)}"
    return text


def number_or_auto(text: str) -> int | None:
    """Return the number, or None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"expected a number or auto, found {text!r}") from None


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
            own; with blocks that of the parameters of all blocks; with experts alone their share.
        widths: `importance`, blocks keep channels by their importance, or `equal`, all FFNs of a
            kind that are equally wide stay so, which stock configs can say.
        remove_blocks: how many blocks go; None for as many as the sparsity says or, if channels
            may go too, as measures best (`cfsp.whole_model.block_count`). With a number the
            sparsity is of the channels, in the blocks that stay.
        remove_attentions: the same of attentions.
        remove_experts: how many of the routed experts of each block go; None for as many as the
            sparsity says, which it can only where nothing else may go. With channels the sparsity
            is of those in the experts that stay.

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
        "with --parts experts: how many routed experts of each block go; with --parts ffn,experts "
        "the sparsity is then of the channels of the others",
        kind=int,
        metavar="N",
        default="as many as --sparsity says",
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
        if {*WHOLE_PARTS} <= {*given}:
            raise UsageError(
                "--parts attention and blocks go one after the other: prune blocks, then "
                "attentions of the result"
            )
        if self.removes_experts and self.whole_part is not None:
            raise UsageError(
                f"--parts {self.whole_part} and experts go one after the other: prune "
                f"{self.whole_part}, then experts of the result"
            )
        counts: tuple[tuple[Part, str, int | None], ...] = (
            ("blocks", "--remove-blocks", self.remove_blocks),
            ("attention", "--remove-attentions", self.remove_attentions),
            ("experts", "--remove-experts", self.remove_experts),
        )
        for part, name, count in counts:
            if count is None:
                continue
            if part not in given:
                raise UsageError(f"{name} belongs to --parts {part} or {part},ffn")
            if count < 0:
                raise UsageError(f"{name} must be at least 0, found {count}")
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"sparsity must be in [0, 1), found {self.sparsity}")
        if self.of not in BUDGET_OF:
            raise UsageError(f"a budget is of 'ffn' or of 'model', found {self.of!r}")
        if self.multiple is not None and self.multiple < 1:
            raise UsageError(f"multiple must be at least 1, found {self.multiple}")
        if self.widths not in WIDTHS:
            raise UsageError(f"--widths must be one of {', '.join(WIDTHS)}, found {self.widths!r}")

    def for_goal(self, goal: object) -> Budget:
        """Return the budget with the parts that a goal is met by.

        Raises:
            UsageError: other parts were asked for.
        """
        if not isinstance(goal, TargetKVCache):
            return self
        if self.parts not in (DEFAULT_PARTS, ("kv",)):
            raise UsageError(
                "--target-kv-cache removes KV groups and nothing else; leave --parts out, found "
                f"--parts {','.join(self.parts)}"
            )
        return replace(self, parts=("kv",))

    @property
    def removes_experts(self) -> bool:
        """Whether whole routed experts may go."""
        return "experts" in self.parts

    @property
    def removes_blocks(self) -> bool:
        """Whether whole blocks may go."""
        return "blocks" in self.parts

    @property
    def whole_part(self) -> WholePart | None:
        """What may go whole; None where nothing may."""
        return next((part for part in WHOLE_PARTS if part in self.parts), None)

    @property
    def remove_whole(self) -> int | None:
        """How many of these go, where the budget says it."""
        return self.remove_attentions if self.whole_part == "attention" else self.remove_blocks

    @property
    def removes_channels(self) -> bool:
        """Whether channels of blocks may go, or KV groups."""
        return any(part in UNIT_PARTS for part in self.parts)

    @property
    def leaves_number_open(self) -> bool:
        """Whether how many go whole, and how many channels of the others, is to be found out."""
        return bool(self.whole_part) and self.removes_channels and self.remove_whole is None

    def multiple_for(self, width_L: Sequence[int]) -> int:
        """Return the multiple that the widths of a model's FFNs of one kind are rounded to."""
        if self.multiple is not None:
            return self.multiple
        widest = max(width_L)
        fitting = (multiple for least, multiple in _MULTIPLES if widest >= least)
        return next(fitting, MULTIPLE_OF_NARROW)


Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class TargetParameters:
    """The goal to keep a fraction of the whole model's parameters.

    Attributes:
        fraction: of all parameters that stays, in (0, 1].
    """

    fraction: float = option(
        1.0,
        "fraction of all parameters that stays",
        kind=fraction,
        flag="target-params",
        metavar="F",
        default="",
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"--target-params must be in (0, 1], found {self.fraction}")


@dataclass(frozen=True)
class TargetKVCache:
    """The goal to keep a fraction of the KV cache, by KV groups alone.

    Attributes:
        fraction: of the KV groups that stays at most, in (0, 1].
    """

    fraction: float = option(
        1.0,
        "fraction of the KV cache that stays; KV groups go, and nothing else",
        kind=fraction,
        flag="target-kv-cache",
        metavar="F",
        default="",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"--target-kv-cache must be in (0, 1], found {self.fraction}")


@dataclass(frozen=True)
class TargetSpeedup:
    """The goal to prune as little as makes the model this much faster on this machine.

    Attributes:
        ratio: tokens per second over those of the model as it is, above 1.
        phase: what shall be faster.
    """

    ratio: float = option(
        2.0,
        "as little as is predicted to make the model X times faster on this machine, which must be "
        "quiet",
        kind=float,
        flag="target-speedup",
        metavar="X",
        default="",
    )
    phase: Phase = option(
        "decode",
        "what --target-speedup is about",
        flag="target-speedup-of",
        choices=PHASES,
        advanced=True,
    )

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise UsageError(f"--target-speedup must be above 1, found {self.ratio}")
        if self.phase not in PHASES:
            raise UsageError(
                f"--target-speedup-of must be one of {', '.join(PHASES)}, found {self.phase!r}"
            )


@dataclass(frozen=True)
class MaxLossIncrease:
    """The goal to prune as much as keeps the loss within a bound.

    The bound holds for the pruned model before repair, on text that calibration has not seen.

    Attributes:
        nats: by how much the mean negative log-likelihood of a token may rise.
        held_out: texts to measure it on; none for windows of the calibration texts that
            calibration leaves over.
        windows: how many windows in all, or of each text in `held_out`.
    """

    nats: float = option(
        0.1,
        "as much as keeps the loss on held-out text within so many nats per token of the dense "
        "model's, before repair; the model must fit into memory",
        kind=float,
        flag="max-loss-increase",
        metavar="NATS",
        default="",
    )
    held_out: tuple[str | Text, ...] = option(
        (),
        "text for --max-loss-increase",
        flag="held-out",
        metavar="TEXT",
        default="windows of --data that calibration leaves over",
        repeats=True,
        advanced=True,
    )
    windows: int = option(
        12,
        "windows in all, or of each --held-out text",
        kind=int,
        flag="held-out-windows",
        metavar="N",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.nats < float("inf"):
            raise UsageError(f"--max-loss-increase must be above 0 nats, found {self.nats}")
        if self.windows < 1:
            raise UsageError(f"--held-out-windows must be at least 1, found {self.windows}")


Goal = TargetParameters | TargetKVCache | MaxLossIncrease | TargetSpeedup


# What counts as important.

DISTANCES = ("angular", "cosine", "euclidean", "mse", "mae")
# All blocks are alike.
UNIFORM = "uniform"
BLOCK_METRICS = (*DISTANCES, UNIFORM)
# By pruning each block (`cfsp.whole_model.sensitivity`), alone or with the angular importance.
# Not every calibration measures that: the whole model must be in memory.
SENSITIVITY, ANGULAR_AND_SENSITIVITY = "sensitivity", "angular+sensitivity"
SENSITIVITY_METRICS = (SENSITIVITY, ANGULAR_AND_SENSITIVITY)
# By sensitivity where it was measured, else by angular distance.
AUTO_METRIC = "auto"
# Which blocks go whole: together by the predictions, together by how far runs of them turn the
# hidden state, or each by what it alone does (ShortGPT's block influence).
DIVERGENCE, RUNS, INFLUENCE = "divergence", "runs", "influence"
REMOVALS = (DIVERGENCE, RUNS, INFLUENCE)
CHANNEL_METRICS = ("relative", "eq8", "activation", "wanda", "magnitude", "random")

Clamp = Literal["water-fill", "published"]
CLAMPS: tuple[Clamp, ...] = get_args(Clamp)
DEFAULT_CLAMP: Clamp = "published"


@dataclass(frozen=True)
class Criterion:
    """What makes a block and a channel important.

    Attributes:
        block_metric: one of `BLOCK_METRICS` or `SENSITIVITY_METRICS`; see `cfsp.planning.coarse`.
            `auto` is `sensitivity` where the statistics have it, else `angular`; it is measured
            where repair follows and the whole model fits into memory.
        channel_metric: one of `CHANNEL_METRICS`; see `cfsp.planning.fine`.
        clamp: what happens where a block would keep more than all (see
            `cfsp.planning.allocation.allocate`); None for what measures best with the block metric.
        removal: how blocks that go whole are chosen, one of `REMOVALS`; see
            `cfsp.planning.block_removal`. `auto` is `divergence` where the whole model fits into
            memory, else `runs`.
    """

    block_metric: str = option(
        AUTO_METRIC,
        "what makes a block important: a distance between its input and output, or sensitivity, "
        "what pruning the block alone does to the predictions, which requires the whole model in "
        "memory; auto: sensitivity where there is repair and that memory, else angular",
        choices=(AUTO_METRIC, *BLOCK_METRICS, *SENSITIVITY_METRICS),
        advanced=True,
    )
    channel_metric: str = option(
        "relative",
        "score that makes a channel important",
        choices=CHANNEL_METRICS,
        advanced=True,
    )
    clamp: Clamp | None = option(
        None,
        "a block that would keep more than all: keep it whole and give the rest to the others "
        "(water-fill), or shrink all importances as the published code does",
        choices=CLAMPS,
        default="water-fill by sensitivity, else published",
        advanced=True,
    )
    removal: str = option(
        AUTO_METRIC,
        "how whole blocks are chosen: by what the predictions lose without them (divergence, which "
        "requires the whole model in memory), by the angular distance over runs of them (runs), or "
        "each by its own cosine distance (influence); auto: divergence where there is that "
        "memory, else runs",
        choices=(AUTO_METRIC, *REMOVALS),
        advanced=True,
    )

    @property
    def chosen_clamp(self) -> Clamp:
        """The clamp, also where none is named: `water-fill` by sensitivity, else `published`."""
        by_sensitivity = self.block_metric in SENSITIVITY_METRICS
        return self.clamp or ("water-fill" if by_sensitivity else DEFAULT_CLAMP)


# Text.

# Whether windows begin with BOS: as the tokenizer begins an input, always, never.
Bos = Literal["auto", "yes", "no"]
BOS: tuple[Bos, ...] = get_args(Bos)
BOS_HELP = "whether windows begin with BOS; auto: as the model's own tokenizer begins an input"


@dataclass(frozen=True)
class Text:
    """A text itself, where otherwise the name of one is given.

    Attributes:
        name: what manifests and tables call it.
        documents: one string, or several.

    Raises:
        TextError: there is no text in it.
    """

    name: str
    documents: Sequence[str]

    def __post_init__(self) -> None:
        documents = (self.documents,) if isinstance(self.documents, str) else self.documents
        if not self.name or not all(isinstance(part, str) for part in (self.name, *documents)):
            raise TextError(
                f"Text(name, documents) needs a name and strings, found {self.name!r} and "
                f"{str(self.documents)[:60]!r}"
            )
        if not any(document.strip() for document in documents):
            raise TextError(f"the text {self.name!r} is empty")
        object.__setattr__(self, "documents", tuple(documents))


def check_bos(bos: str) -> None:
    """Check that a choice is one of those there are."""
    if bos not in BOS:
        raise UsageError(f"--bos must be one of {', '.join(BOS)}, found {bos!r}")


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on; see `cfsp.text.windows.draw_windows`.

    Attributes:
        names: of texts, or texts themselves; `self` stands for text that the model writes.
        samples: windows in all; None for 128, or all that there are if that is less.
        seqlen: tokens in a window, BOS included.
        seed: of the draw of windows.
        bos: whether windows begin with BOS.
    """

    names: tuple[str | Text, ...] = option(
        (DEFAULT_TEXT,),
        "text to calibrate on: wikitext2, c4, a hub data set as NAME:CONFIG:SPLIT:COLUMN, a .txt, "
        ".jsonl or .parquet file (also of conversations, with images), mixed (nine kinds of text "
        "that come with cfsp) or one of them as mixed/KIND, or self (the model writes it); repeat "
        "it to mix",
        flag="data",
        metavar="TEXT",
        default=DEFAULT_TEXT,
        repeats=True,
    )
    samples: int | None = option(
        None,
        "windows of text in all",
        kind=int,
        metavar="N",
        default="128, or all there are",
    )
    seqlen: int = option(DEFAULT_SEQLEN, "tokens in a window", kind=int, metavar="T")
    seed: int = option(0, "of the draw of windows", kind=int, advanced=True)
    bos: Bos = option("auto", BOS_HELP, choices=BOS, advanced=True)

    def __post_init__(self) -> None:
        check_bos(self.bos)
        if not self.names:
            raise UsageError(
                "there is no text to calibrate on; give one or several: wikitext2, c4, "
                "mixed, a .txt, .jsonl or .parquet file, or Text(name, documents)"
            )
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed must be in [0, 2^63), found {self.seed}")
        if self.seqlen > LONGEST_WINDOW:
            raise UsageError(f"--seqlen must be at most {LONGEST_WINDOW}, found {self.seqlen}")
        if self.samples is not None and self.samples > MOST_WINDOWS:
            raise UsageError(f"--samples must be at most {MOST_WINDOWS}, found {self.samples}")


@dataclass(frozen=True)
class EvaluationText:
    """Which texts to measure perplexity on: the first windows of each.

    Attributes:
        names: of texts, or texts themselves.
        windows: of each text; None for all.
        seqlen: tokens in a window, BOS included; None for 1024, or what the model can read if that
            is less.
        stride: tokens between the starts of windows; None for windows that stand on their own.
        bos: whether windows begin with BOS.
    """

    names: tuple[str | Text, ...] = option(
        (),
        "text to measure perplexity on, before and after",
        flag="eval",
        metavar="TEXT",
        default="none",
        repeats=True,
    )
    windows: int | None = option(
        12, "windows of each --eval text", kind=int, flag="eval-windows", metavar="N", advanced=True
    )
    seqlen: int | None = option(
        None,
        "tokens in a window of an --eval text",
        kind=int,
        flag="eval-seqlen",
        metavar="T",
        default="1024, or what the model can read",
        advanced=True,
    )
    stride: int | None = None
    bos: Bos = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)
        # Now, not after an hour of pruning.
        if self.windows is not None and self.windows < 1:
            raise UsageError(f"expected at least 1 window to measure on, found {self.windows}")
        if self.seqlen is not None and not 2 <= self.seqlen <= LONGEST_WINDOW:
            raise UsageError(
                f"expected windows of 2 to {LONGEST_WINDOW} tokens to measure on, found "
                f"{self.seqlen}"
            )


# Where and in what to compute.

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Compute:
    """Where to compute and in what; `cfsp.engine.compute.resolve` makes `auto` definite.

    Attributes:
        device: `auto` or a device that torch knows.
        dtype: `auto` or a name.
        batch_windows: windows that pass a block together; None for about 4096 tokens.
        memory_budget: bytes of hidden states above which they go to a file; None for a share
            of the available memory.
    """

    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps, ...", default="an accelerator if there is one"
    )
    dtype: str = option(
        "auto", "what to compute in", choices=DTYPES, default="the model's own", advanced=True
    )
    batch_windows: int | None = option(
        None,
        "windows that pass a block together",
        kind=int,
        metavar="N",
        default="about 4096 tokens",
        advanced=True,
    )
    memory_budget: int | None = option(
        None,
        "hidden states above this size (2GB, 512MiB) go to a file beside the output",
        kind=lambda text: parse_size(text),
        metavar="SIZE",
        default="half of the available memory",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if self.batch_windows is not None and self.batch_windows < 1:
            raise UsageError(f"--batch-windows must be at least 1, found {self.batch_windows}")


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Return the number of bytes that a text like 2GB, 512MiB or 1e9 means.

    Raises:
        UsageError: it means none.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        if match is None or (match[3] and not match[2]):
            raise ValueError
        unit = _BINARY_UNITS[match[2]] if match[3] else _UNITS[match[2]]
        return int(float(match[1]) * unit)
    except (ValueError, OverflowError):
        raise UsageError(f"expected a size such as 2GB or 512MiB, found {text!r}") from None


# How much repair to do.

Repair = Literal["none", "ridge", "sequential", "local"]
# Each is a step beyond the one before it.
REPAIRS: tuple[Repair, ...] = get_args(Repair)
DEFAULT_REPAIR: Repair = "ridge"

EFFORTS: dict[str, Repair] = {"fast": "none", "standard": "ridge", "best": "ridge"}
# After its repair the model is trained whole, where there is memory for that; else blockwise.
BEST_EFFORT = "best"
BEST_WITHOUT_TRAINING: Repair = "local"


@dataclass(frozen=True)
class LocalTraining:
    """How local repair trains blocks; see `cfsp.repair.local`.

    Attributes:
        steps: of Adam, in each group of blocks; twice as many in the last group.
        blocks: how many consecutive blocks train together, towards the hidden states after the
            last of them. The time hardly depends on it; what training holds in memory does. The
            model's last group, whose loss is what counts in the end, is twice as large.
        text: the part of the text itself in the last group's loss, from 0 to 1; the rest is the
            divergence from the dense model's predictions.
        rate: the highest learning rate of any block, as a part of the root mean square of each
            tensor, because models differ in the size of their weights and Adam's steps do not
            follow it.
        rate_per_error: the highest learning rate of a block by its error before. The first
            blocks of a model have hardly any, and steps as long as those of others only add some.
        head_rate: the highest learning rate of the last group, whose loss at the head, of few
            tokens and of many words, is far noisier.
        warm_up: steps in which the rate rises; it falls along a cosine to zero.
        tokens: about how many there are in a batch.

    Raises:
        UsageError: there are no steps, no blocks in a group, or no such part of the text.
    """

    steps: int = option(
        100,
        "of local repair: training steps for each group of blocks",
        kind=int,
        flag="local-steps",
        metavar="N",
        advanced=True,
    )
    blocks: int = option(
        3,
        "of local repair: how many consecutive blocks train together, twice as many at the model's "
        "end; more need more memory",
        kind=int,
        flag="local-blocks",
        metavar="N",
        advanced=True,
    )
    text: float = option(
        0.5,
        "of local repair: the part of the text itself in the loss of the last blocks, from 0 to 1; "
        "the rest is the divergence from the dense model",
        kind=float,
        flag="local-text",
        metavar="F",
        advanced=True,
    )
    rate: float = 0.012
    rate_per_error: float = 0.04
    head_rate: float = 0.003
    warm_up: int = 10
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--local-steps must be at least 1, found {self.steps}")
        if self.blocks < 1:
            raise UsageError(f"--local-blocks must be at least 1, found {self.blocks}")
        if not 0 <= self.text <= 1:
            raise UsageError(f"--local-text must be from 0 to 1, found {self.text}")


@dataclass(frozen=True)
class PruneSettings:
    """How to prune.

    Attributes:
        budget: how much to remove; without meaning when a plan is given.
        criterion: what counts as important; likewise.
        text: what to calibrate and repair on.
        compute: where and in what.
        repair: how far up the ladder to go: `none`; `ridge` repairs the down projections by least
            squares; `sequential` then repairs them on the pruned model's own hidden states;
            `local` goes on from there and trains a few blocks at a time.
        local: how `local` trains.
    """

    budget: Budget
    criterion: Criterion = field(default_factory=Criterion)
    text: CalibrationText = field(default_factory=CalibrationText)
    compute: Compute = field(default_factory=Compute)
    repair: Repair = DEFAULT_REPAIR
    local: LocalTraining = field(default_factory=LocalTraining)

    def __post_init__(self) -> None:
        if self.repair not in REPAIRS:
            raise UsageError(f"repair must be one of {', '.join(REPAIRS)}, found {self.repair!r}")
        metric = self.criterion.block_metric
        if self.budget.widths == "equal" and metric not in (AUTO_METRIC, UNIFORM):
            raise UsageError(
                f"--widths equal makes all blocks alike, so --set block_metric={metric} would do "
                "nothing; give one of the two"
            )

    def with_suitable_metric(self) -> PruneSettings:
        """Return the same settings; of `auto`, blocks go by angular distance without repair.

        Widths by sensitivity are better with repair and worse without (LOG.md). Equal widths
        follow nothing.
        """
        if self.budget.widths == "equal":
            return replace(self, criterion=replace(self.criterion, block_metric=UNIFORM))
        if self.repair != "none" or self.criterion.block_metric != AUTO_METRIC:
            return self
        return replace(self, criterion=replace(self.criterion, block_metric="angular"))

    @staticmethod
    def of_removal(parts: Sequence[Part]) -> list[PruneSettings]:
        """Return settings by which as much goes whole as plans may ask; none if nothing may."""
        whole = (part for part in WHOLE_PARTS if part in parts)
        return [PruneSettings(Budget(MOST_REMOVED, parts=(part,))) for part in whole]

    def without_repair(self) -> PruneSettings:
        """Return the same settings, without repair."""
        return replace(self, repair="none")
