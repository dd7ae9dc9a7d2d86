"""The plan: a complete decision, as a value that can be saved, read and inspected.

Surgery only obeys it. On disk it is JSON, in which the units (see `cfsp.planning.unit_plan`) are
called blocks: most models have one in every block, and entries that do not name their block are of
the first, the second, and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfsp.architecture.block_names import index_without
from cfsp.checkpoint.locating import given_path
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import PlanError, why_unread
from cfsp.planning.unit_plan import MAX_BLOCKS, UnitPlan, unit_from_json
from cfsp.settings import COUNTED, PARTS, UNIT_PARTS, Part

PLAN_VERSION = 1
# Of a plan with other parts than FFNs; one without is written as version 1, the same bytes.
VERSION_WITH_PARTS = 2
# Names of metrics, dtypes and devices; nothing that could format a card.
_WORD = re.compile(r"[\w.+:-]{1,60}")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a plan was made for."""

    name: str
    model_type: str
    fingerprint: str

    @classmethod
    def of(cls, source: WeightSource) -> ModelIdentity:
        """Return the identity of a model."""
        return cls(source.label, source.config.model_type, source.fingerprint)


@dataclass(frozen=True)
class PruningPlan:
    """Which channels of which model stay.

    Attributes:
        model: the model it was made for.
        criterion: block metric, channel metric, sparsity and what it is of, multiple.
        calibration: the conditions of the calibration (see `CalibrationRecord`).
        units: one entry for each FFN unit of the model, in the order of blocks; those of removed
            blocks keep no channel.
        removed_blocks: indices of the blocks that go whole, ascending.
    """

    model: ModelIdentity
    criterion: dict[str, Any]
    calibration: dict[str, Any]
    units: tuple[UnitPlan, ...]
    removed_blocks: tuple[int, ...] = ()

    @property
    def kept_widths(self) -> list[int]:
        """Number of channels of every unit (each of its experts) of the pruned model."""
        return [unit.kept_width for unit in self.kept_units]

    @property
    def kept_units(self) -> list[UnitPlan]:
        """The units of the blocks that stay."""
        return [unit for unit in self.units if unit.block not in self.removed_blocks]

    @property
    def removed_attentions(self) -> tuple[int, ...]:
        """The blocks that stay and whose attention layers go whole, ascending."""
        return tuple(unit.block for unit in self.kept_units if not unit.kept)

    @property
    def has_gaps(self) -> bool:
        """Whether blocks go whole, or attention layers."""
        return bool(self.removed_blocks or self.removed_attentions)

    @property
    def narrows(self) -> bool:
        """Whether units lose channels, beside those that go whole."""
        return any(0 < unit.kept_width < unit.width for unit in self.kept_units)

    def index_of_block(self, block: int) -> int:
        """Return the index in the pruned model of a block that stays."""
        return index_without(self.removed_blocks, block)

    def only(self, part: Part) -> PruningPlan:
        """Return the plan of one part's units."""
        return replace(self, units=self.of_part(part))

    def widths_of(self, part: Part) -> tuple[list[int], list[int]]:
        """Return how many channels the units of a part have before, and in the pruned model."""
        before = [unit.width for unit in self.of_part(part)]
        return before, [unit.kept_width for unit in self.kept_units if unit.part == part]

    @property
    def kept_channels(self) -> list[tuple[int, ...]]:
        """Indices of the channels that stay in every unit."""
        return [unit.kept for unit in self.units]

    @property
    def ffn_sparsity(self) -> float:
        """Fraction of all FFN channels that goes, each counted by the parameters that it owns."""
        return self.sparsity_of("ffn")

    def sparsity_of(self, part: Part) -> float:
        """Return the fraction of a part's channels, or KV groups, that goes, counted likewise."""
        units = self.of_part(part)
        kept = sum(len(unit.kept) / unit.ffns * unit.cost for unit in units)
        return 1 - kept / sum(unit.width * unit.cost for unit in units) if units else 0.0

    @property
    def counts_channels(self) -> bool:
        """Whether channels of all FFNs own as many parameters: a share of one is of the other."""
        costs = {unit.cost for unit in self.of_part("ffn")}
        return len(costs) <= 1 and self.kept_experts is None

    @property
    def has_one_unit_each(self) -> bool:
        """Whether units need no other name than the number of their block."""
        return all(unit.block == i and not unit.path for i, unit in enumerate(self.units))

    @property
    def has_parts(self) -> bool:
        """Whether anything goes that version 1 cannot say."""
        gone = self.removed_blocks or self.kept_experts is not None
        return bool(gone or self.of_part("kv"))

    @property
    def kept_experts(self) -> int | None:
        """How many experts every block with routed ones keeps; None where none goes whole."""
        return next((len(u.kept_ffns) for u in self.kept_units if u.loses_experts), None)

    @property
    def lost_output(self) -> float:
        """Share of what all experts add that those add which go whole, mean over their blocks."""
        lost = [unit.lost_output for unit in self.kept_units if unit.loses_experts]
        return sum(lost) / len(lost) if lost else 0.0

    @property
    def experts_in_words(self) -> str:
        """What goes of the experts, and how much that is of what all add."""
        units = [unit for unit in self.kept_units if unit.loses_experts]
        first, worst = units[0], max(units, key=lambda unit: unit.lost_output)
        gone = first.ffns - len(first.kept_ffns)
        return (
            f"{gone} of {first.ffns} experts of each block go ({gone / first.ffns:.1%}), which add "
            f"{self.lost_output:.1%} of what all experts add to the hidden states (most in block "
            f"{worst.block}: {worst.lost_output:.1%})"
        )

    @property
    def experts_of_blocks(self) -> dict[int, list[int]]:
        """Which experts stay in every block that loses some."""
        return {unit.block: unit.kept_ffns for unit in self.kept_units if unit.loses_experts}

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that a model is opened with, to find the units of the plan."""
        whole: dict[Part, bool] = {
            # Some attention layers can go only as a whole.
            "attention": "attention" in self.criterion.get("parts", ()),
            "experts": self.kept_experts is not None,
        }
        units = (part for part in UNIT_PARTS if self.of_part(part))
        return (*units, *(part for part in whole if whole[part]))

    def of_part(self, part: Part) -> tuple[UnitPlan, ...]:
        """Return the units of one part."""
        return tuple(unit for unit in self.units if unit.part == part)

    @property
    def experts_with_few_tokens(self) -> list[dict[str, Any]]:
        """Block, expert and tokens of every expert that saw too few tokens to be scored by them.

        Those of units that go whole, or lose nothing, are not among them. With the unit's path
        where it has one.
        """
        return [
            {
                "block": unit.block,
                **({"path": unit.path} if unit.path else {}),
                "expert": expert,
                "tokens": seen,
            }
            for unit in self.kept_units
            if unit.kept_share < 1
            for expert, seen in unit.few_tokens.items()
        ]

    def check_fits(self, source: WeightSource) -> None:
        """Check that the plan was made for this model."""
        found = ModelIdentity.of(source)
        if (found.model_type, found.fingerprint) != (self.model.model_type, self.model.fingerprint):
            raise PlanError(
                f"the plan was made for {self.model.name} ({self.model.model_type}, "
                f"{self.model.fingerprint}), not for {source.label} ({found.model_type}, "
                f"{found.fingerprint}); make a plan for this model"
            )
        blocks = source.architecture.block_count
        if self.removed_blocks and not max(self.removed_blocks) < blocks > len(self.removed_blocks):
            raise PlanError(
                f"the plan removes block {max(self.removed_blocks)} and others, and {source.label} "
                f"has {blocks}; make a new plan"
            )
        planned = [(unit.block, unit.part, unit.width, unit.ffns) for unit in self.units]
        there = [(unit.block, unit.part, unit.width, unit.ffns) for unit in source.units]
        if planned != there or any(
            mine.path not in ("", its.path)
            for mine, its in zip(self.units, source.units, strict=True)
        ):
            raise PlanError(
                f"the plan's widths or experts are not those of {source.label}; make a new plan"
            )
        counts = {len(unit.kept_ffns) for unit in self.kept_units if unit.ffns > 1}
        if self.kept_experts is not None and len(counts) > 1:
            raise PlanError(
                f"the plan keeps {' or '.join(map(str, sorted(counts)))} experts, expected as many "
                "in every block; make a new plan"
            )

    def to_json(self) -> str:
        """Return the plan as JSON; the same plan gives the same bytes."""
        is_placed = not self.has_one_unit_each
        fields = {
            "plan_version": VERSION_WITH_PARTS if self.has_parts else PLAN_VERSION,
            "model": vars(self.model),
            "criterion": self.criterion,
            "calibration": self.calibration,
            **({"removed_blocks": self.removed_blocks} if self.removed_blocks else {}),
            "blocks": [unit.to_json(is_placed=is_placed) for unit in self.units],
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the plan") -> PruningPlan:
        """Return the plan that `to_json` wrote; errors call it `where`."""
        try:
            fields = json.loads(text)
            version = fields["plan_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PlanError(
                f"{where} is not a pruning plan; make one with: cfsp prune --dry-run"
            ) from error
        if version not in (PLAN_VERSION, VERSION_WITH_PARTS):
            raise PlanError(
                f"{where} has plan version {version}, expected {PLAN_VERSION} or "
                f"{VERSION_WITH_PARTS}; make a new plan"
            )
        try:
            if not fields["blocks"]:
                raise ValueError("it describes no block")
            removed = _checked_blocks(fields.get("removed_blocks", []))
            units = tuple(
                unit_from_json(entry, i, removed) for i, entry in enumerate(fields["blocks"])
            )
            if [unit.block for unit in units] != sorted(unit.block for unit in units):
                raise ValueError("its blocks are not in order")
            model = ModelIdentity(**fields["model"])
            _check_facts(model, fields)
            criterion, calibration = dict(fields["criterion"]), dict(fields["calibration"])
            return cls(model, criterion, calibration, units, removed)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise PlanError(f"{where} is damaged: {error}; make a new plan") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            PlanError: the file is missing, damaged or of another version.
        """
        try:
            text = given_path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"cannot read the plan {path}: {why_unread(error)}; name one such as "
                "smaller/cfsp_plan.json, or make one with: cfsp prune --dry-run"
            ) from error
        return cls.from_json(text, str(path))


def _check_facts(model: ModelIdentity, fields: dict[str, Any]) -> None:
    """Check what cards, reports and other commands read of a plan beside its units."""
    if not all(isinstance(value, str) for value in vars(model).values()):
        raise TypeError("the model's name, type and fingerprint must be text")
    criterion, calibration = fields["criterion"], fields["calibration"]

    def check(table: dict[str, Any], names: str, is_sound: Callable[[Any], Any]) -> None:
        for name in names.split():
            if not is_sound(table[name]):
                raise ValueError(f"it has {table[name]!r} for {name}")

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and bool(_WORD.fullmatch(value))

    check(criterion, "multiple", lambda value: type(value) is int and value >= 1)
    check(calibration, "windows seqlen", lambda value: type(value) is int and value >= 1)
    check(calibration, "seed", lambda value: type(value) is int)
    check(criterion, "block_metric channel_metric", is_word)
    check(criterion, "of", lambda value: value in ("ffn", *COUNTED))
    check({"removal": "", **criterion}, "removal", lambda value: isinstance(value, str))
    check(
        {"parts": [], **criterion},
        "parts",
        lambda value: isinstance(value, list) and all(part in PARTS for part in value),
    )
    check(calibration, "dtype device", is_word)
    check(criterion, "sparsity", lambda value: type(value) in (int, float) and 0 <= value <= 1)
    sources = calibration["sources"]
    if not isinstance(sources, dict) or not all(type(n) is int for n in sources.values()):
        raise TypeError("the calibration's sources must be a table of windows")


def _checked_blocks(blocks: list[Any]) -> tuple[int, ...]:
    """Return the indices of removed blocks, ascending and each once."""
    if not all(type(block) is int and 0 <= block <= MAX_BLOCKS for block in blocks):
        raise ValueError(f"it removes the impossible blocks {str(blocks)[:60]}")
    if blocks != sorted(set(blocks)):
        raise ValueError("its removed blocks are not in order")
    return tuple(blocks)
