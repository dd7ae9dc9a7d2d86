"""The facts about a checkpoint: terminal, model card, `inspect` and page print the same ones.

Numbers are a list of `Fact`, from a manifest here, from results of eval and bench in
`cfsp.result.runs`; how it was made, in words, is in `cfsp.result.making`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cfsp.architecture.block_names import blocks_in_words, counted, removed_in_words
from cfsp.planning.unit_plan import UnitPlan
from cfsp.quality.paired import Number
from cfsp.result.names import short_names
from cfsp.result.tables import Table, human_bytes, human_count
from cfsp.text.offline import parts_of
from cfsp.text.sources import identity_of

NOTHING = "\N{EN DASH}"
_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
SIZE, QUALITY, SPEED = "Size", "Perplexity", "Tokens per second"  # headings of tables
PARAMETERS = "parameters"
# What a manifest says of the same form, and what it is called.
_OTHER_PARTS = {"kv_groups": "KV groups", "experts": "experts"}


@dataclass(frozen=True)
class Unit:
    """How numbers are written, and what is said of two of them: their `ratio`, a `share`, or ''."""

    write: Callable[[float], str]
    change: str = ""

    def __call__(self, number: Number | None) -> str:
        """Return a number in words; a dash for none."""
        return NOTHING if number is None else self.write(number.value).replace("-", _MINUS)


COUNT = Unit("{:,.0f}".format, "share")
BYTES = Unit(human_bytes)
PERPLEXITY = Unit("{:.2f}".format, "ratio")
RATE = Unit("{:,.1f}".format)
NATS = Unit("{:z.3f}".format)
PERCENT = Unit(lambda share: f"{100 * share:z.1f}")


# What was measured of the original of a run, `before`, and of the run itself, `after`.
Sides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Conditions:
    """Conditions of a perplexity, and of the agreement on the same windows."""

    text: str
    tokens: int  # that were predicted
    windows: int
    seqlen: int
    bos: bool
    evaluation_part: bool  # of the text, that nothing is calibrated or trained on
    tokens_digest: str  # of the windows
    dtype: str  # that it was computed in

    @classmethod
    def of(cls, text: str, entry: Mapping[str, Any]) -> Conditions:
        """Return those of an entry of a manifest or of `cfsp eval --json`."""
        return cls(text, *(entry[each.name] for each in fields(cls)[1:]))

    def beside(self, models: Mapping[str, Mapping[str, Any]]) -> str:
        """Return all but the text, and which models have read it, given their manifests by name."""
        measured = identity_of(self.text, "evaluation")
        known = {measured, *map(identity_of, (self.text, *parts_of(self.text)))}
        read = {name: {*map(identity_of, texts_that_made(each))} for name, each in models.items()}
        made = [name for name, texts in read.items() if known & texts]
        if not made:
            return str(self)
        # Under another name somebody may have read what others hold out.
        is_apart = measured == identity_of(self.text) or not any(measured in read[m] for m in made)
        text = "other parts of this text" if self.evaluation_part and is_apart else "this text"
        who = f"{' and '.join(made)} " if len(made) < len(models) else ""
        return f"{self}; {who}calibrated or trained on {text}"

    def __str__(self) -> str:
        """Return all but the text: `12 windows of 1,024 tokens, with BOS, in float32`."""
        bos = "with BOS" if self.bos else "without BOS"
        windows = counted(self.windows, "windows")
        return f"{windows} of {self.seqlen:,} tokens, {bos}, in {self.dtype}"


def recoveries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how a model was recovered, mostly once: each with its command, the last one last."""
    if not (last := dict(manifest.get("recovery") or {})):
        return []
    earlier: list[dict[str, Any]] = last.pop("earlier", [])
    # Of the last command, at the top of a manifest.
    run = {key: manifest.get(key) for key in ("command", "created", "versions")}
    return [*earlier, last | run]


def first_model(manifest: Mapping[str, Any]) -> str:
    """Return what the model is called that a checkpoint was made from."""
    return "original" if manifest.get("base_model", {}).get("made_from") else "dense"


def was_pruned(manifest: Mapping[str, Any]) -> bool:
    """Return whether cfsp pruned a model; recovery takes others too."""
    return "criterion" in manifest


def repair_text(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what repair read where that is not what calibration did; empty if it is."""
    found: dict[str, Any] = (manifest.get("repair") or {}).get("text", {})
    calibrated = (manifest.get("calibration") or {}).get("tokens_digest")
    return {} if found.get("tokens_digest") == calibrated else found


def texts_that_made(manifest: Mapping[str, Any]) -> set[str]:
    """Return the names of the texts that a model was calibrated, repaired or trained on."""
    tables = [manifest.get("calibration"), repair_text(manifest)]
    tables += [each.get("data") for each in recoveries(manifest)]
    before = (manifest.get("base_model") or {}).get("texts", ())  # of one that was made itself
    return {*before, *(name for table in tables for name in (table or {}).get("sources", {}))}


def perplexities(manifest: Mapping[str, Any]) -> dict[Conditions, dict[str, float]]:
    """Return those of a manifest by conditions: of the `dense`, `pruned` and `recovered` model.

    A model that was trained without having been pruned has no `pruned` one; of one that was pruned
    again what was pruned is called `original`.
    """
    found: dict[Conditions, dict[str, float]] = {}
    original = first_model(manifest)
    sides = [(original, "before", manifest), ("pruned", "after", manifest)]
    if stages := recoveries(manifest):
        before = "pruned" if was_pruned(manifest) else original
        sides += [(before, "before", stages[0]), ("recovered", "after", stages[-1])]
    for model, side, table in sides:
        for text, value in (table.get("perplexity") or {}).items():
            found.setdefault(Conditions.of(text, value), {})[model] = float(value[side])
    return found


@dataclass(frozen=True)
class Fact:
    """A number of the original and of what was made of it; None where it is not known."""

    heading: str  # of the table that it belongs to
    name: str
    unit: Unit
    before: Number | None = None
    after: Number | None = None
    text: str = ""  # that it was measured on
    conditions: Conditions | None = None  # of what was measured on it
    detail: str = ""
    ratio: float | None = None  # after / before as it was measured, where that is another
    digest: str = ""  # of the documents or questions that it was measured on

    @property
    def key(self) -> tuple[str, str, str, Conditions | None, str, str]:
        """What the numbers of several models must have in common to compare."""
        # Which blocks are gone differs; on how many documents a score is must not.
        measured_on = "" if self.heading == SIZE else self.detail
        return self.heading, self.name, self.text, self.conditions, measured_on, self.digest

    def of(self, side: str, number: Number) -> Fact:
        """Return the same with a number of the original, `before`, or of the other, `after`."""
        return replace(self, before=number) if side == "before" else replace(self, after=number)

    @property
    def change(self) -> str:
        """What came of it: −20.1%, × 1.27; empty where that says nothing."""
        if self.ratio is not None:
            return f"{_TIMES} {self.ratio:.2f}"
        if self.before is None or self.after is None or not self.unit.change:
            return ""
        ratio = self.after.value / self.before.value
        if self.unit.change == "ratio":
            return f"{_TIMES} {ratio:.2f}"
        return f"{ratio - 1:+z.1%}".replace("-", _MINUS)

    @property
    def row(self) -> tuple[str, str, str]:
        """The two numbers and what came of it."""
        return self.unit(self.before), self.unit(self.after), self.change

    def note(self, number: Number | None) -> str:
        """Return what stands beside a number: its standard error."""
        return (
            "" if number is None or number.stderr is None else f"± {self.unit.write(number.stderr)}"
        )


def joined(facts: Iterable[Fact], *, finite: bool = True) -> list[Fact]:
    """Return one fact for each key; what comes later counts.

    A number that is none is a ValueError: no chart has a place for it. A table has.
    """
    found: dict[Any, Fact] = {}
    for fact in facts:
        told = [number.value for number in (fact.before, fact.after) if number is not None]
        if finite and not all(map(math.isfinite, [*told, fact.ratio or 0.0])):
            raise ValueError(f"{fact.name} is no number")
        known = found.setdefault(fact.key, fact)
        before, after = fact.before or known.before, fact.after or known.after
        # A ratio is of the two numbers that were measured together.
        found[fact.key] = replace(known, before=before, after=after, ratio=fact.ratio)
    return list(found.values())


def labels(facts: Iterable[Fact]) -> dict[Fact, str]:
    """Return what facts are called: with the short name of the text that they are of, if any."""
    facts = list(facts)
    names = short_names(fact.text for fact in facts if fact.text)
    return {fact: f"{fact.name}, {names[fact.text]}" if fact.text else fact.name for fact in facts}


def size_facts(manifest: Mapping[str, Any], weight_bytes: int = 0) -> list[Fact]:
    """Return how large a pruned model and its original are, as far as that is known."""
    if "parameters_after" not in manifest:  # of what was pruned in memory it is not recorded
        return []

    def fact(name: str, before: float, after: float, detail: str = "") -> Fact:
        numbers = Number(float(before)), Number(float(after))
        return Fact(SIZE, name, COUNT, *numbers, detail=detail)

    before, after = manifest["parameters_before"], manifest["parameters_after"]
    facts = [fact(PARAMETERS, before, after)]
    if removed := manifest.get("removed_blocks"):
        blocks = manifest["blocks_before"]
        detail = f"without {blocks_in_words(removed)}"
        facts.append(fact("blocks", blocks, blocks - len(removed), detail))
    if removed := manifest.get("removed_attentions"):
        detail = f"of {blocks_in_words(removed)}"
        count = Number(len(removed))
        facts.append(Fact(SIZE, "attention layers removed", COUNT, after=count, detail=detail))
    channels = manifest["ffn_channels"]
    facts.append(fact("FFN channels", channels["before"], channels["after"]))
    for key, noun in _OTHER_PARTS.items():
        if part := manifest.get(key):
            facts.append(fact(noun, sum(part["before"]), sum(part["after"])))
    if weight_bytes:
        dense = Number(weight_bytes / after * before)
        detail = "the original's: of its parameters at the same bytes each"
        disk = Number(weight_bytes)
        facts.append(Fact(SIZE, "weights on disk", BYTES, dense, disk, detail=detail))
    return facts


def perplexity_facts(manifest: Mapping[str, Any]) -> list[Fact]:
    """Return the perplexities of a finished model, each beside the dense model's if it is known."""
    original, last = first_model(manifest), "recovered" if manifest.get("recovery") else "pruned"
    return [
        replace(
            perplexity_fact(conditions),
            before=Number(of[original]) if original in of else None,
            after=Number(of[last]),
        )
        for conditions, of in perplexities(manifest).items()
        if last in of
    ]


def perplexity_fact(conditions: Conditions) -> Fact:
    """Return the fact of a perplexity, still without numbers."""
    return Fact(QUALITY, "perplexity", PERPLEXITY, text=conditions.text, conditions=conditions)


def speed_facts(first: Mapping[str, Any], both: Sides) -> list[Fact]:
    """Return tokens per second by phase and workload; ratios if the first is the original."""
    facts, compared = [], both.get("before") is first
    for side, model in both.items():
        how = [f"{model['dtype']} on {model['device']}"] if "device" in model else []
        how += [counted(model["threads"], "threads")] if model.get("device") == "cpu" else []
        for workload in model["workloads"]:
            shape = f"batch {workload['batch']}, prompt {workload['prompt']}"
            generated = f", {workload['new_tokens']} new tokens"
            for phase, more in (("prefill", ""), ("decode", generated)):
                figures = workload[phase]
                busy = ["too busy for a ratio"] if figures.get("too_busy") else []
                has_ratio = side == "after" and compared and not busy
                ratio = float(figures["ratio"]) if has_ratio else None
                name, detail = f"{phase}, {shape}{more}", ", ".join([*how, *busy])
                fact = Fact(SPEED, name, RATE, detail=detail, ratio=ratio)
                facts.append(fact.of(side, Number(float(figures["tokens_per_second"]))))
    return facts


def what_went(manifest: Mapping[str, Any], *, by_channels: bool = True) -> str:
    """Return in words what went of each part that lost something, and of all parameters.

    The share of FFN channels is that of their parameters, too, `by_channels`; else they own unlike
    numbers of these.
    """
    experts = manifest.get("experts")
    removed = removed_in_words(
        *(manifest.get(key, ()) for key in ("removed_blocks", "removed_attentions"))
    )
    channels = "channels" if by_channels and not experts else "parameters"
    shares = {
        f"FFN {channels}": manifest.get("ffn_sparsity", 0.0),
        "KV groups": manifest.get("kv_groups", {}).get("sparsity", 0.0),
    }
    went = [f"{share:.1%} of {nouns}" for nouns, share in shares.items() if share]
    if experts:
        before, after = experts["before"][0], experts["after"][0]
        went.append(f"{before - after} of the {before} experts of each block")
    in_all = ", ".join([*went, f"{manifest.get('model_sparsity', 0.0):.1%} of parameters"])
    return f"{removed}, in all {in_all}" if removed else in_all


def unit_rows(units: Iterable[UnitPlan]) -> list[tuple[str, ...]]:
    """Return of each unit of a plan: name, distance, importance, width, and how many stay."""
    return [
        (
            unit.name,
            f"{unit.distance:.4f}",
            f"{unit.importance:.3f}",
            str(unit.width),
            unit.kept_in_words,
        )
        for unit in units
    ]


_GOALS = {
    "target_params": "{asked:g} of all parameters",
    "target_kv_cache": "at most {asked:g} of the KV cache of {context:,} tokens",
    "target_speedup": "at least {asked:g} times faster in {phase}",
    "max_loss_increase": "at most {asked:g} nats per token over {dense_loss:.3f}, before repair",
}
_VALUES = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def goal_in_words(resolution: Mapping[str, Any]) -> str:
    """Return what was asked for instead of a sparsity, from the JSON of what that came to."""
    told = {**resolution["conditions"], "asked": resolution["asked"]}
    words = _GOALS[resolution["goal"]].format(**told)
    result = resolution.get("result")
    return words if result is None else f"{words} (the result: {result:+.3f})"


def goal_table(resolution: Mapping[str, Any]) -> Table | None:
    """Return what was tried for a goal, from the least that went to the most; None for nothing."""
    rows = [
        (
            f"{entry['sparsity']:.1%}",
            human_count(entry["parameters"]),
            f"{entry['value']:.3f}",
            "yes" if entry["fits"] else "no",
        )
        for entry in sorted(resolution.get("tried", ()), key=lambda entry: entry["sparsity"])
    ]
    head = ("sparsity", "parameters", _VALUES.get(resolution.get("goal", ""), ""), "fits")
    return Table(head, rows) if rows else None
