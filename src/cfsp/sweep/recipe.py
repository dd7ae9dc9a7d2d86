"""A list of settings of `cfsp prune`, and the TOML file that gives the same list again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from cfsp.errors import UsageError
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.settings import (
    DEFAULT_REPAIR,
    DEFAULT_TEXT,
    Bos,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    EvaluationText,
    PruneSettings,
    from_names,
    options_of,
)
from cfsp.sweep.methods import METHODS, Method, method_named

# What a method may say, with its type; how much goes is the recipe's.
_OF_METHODS: dict[str, Any] = {"name": str, "repair": str} | {
    option.name: get_type_hints(settings)[field]
    for settings in (Budget, Criterion)
    for field, option in options_of(settings).items()
    if field not in ("sparsity", "remove")
}
# A method's name begins that of a directory.
_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,63}")


@dataclass(frozen=True)
class Point:
    """One model of a sweep: the name of its directory and of its method, and how it is pruned."""

    name: str
    method: str
    settings: PruneSettings

    @property
    def sparsity(self) -> float:
        """Fraction to remove."""
        return self.settings.budget.sparsity

    @property
    def seed(self) -> int:
        """Of the draw of its calibration windows."""
        return self.settings.text.seed


@dataclass(frozen=True)
class Recipe:
    """What a sweep does: every method at every sparsity, by every draw of windows."""

    model: str
    sparsity: tuple[float, ...]
    methods: tuple[Method, ...] = (METHODS["cfsp"],)  # in a file also a name alone
    multiple: int | None = None  # whatever the method; None for its own choice
    data: tuple[str, ...] = (DEFAULT_TEXT,)
    samples: int | None = None
    seqlen: int = CalibrationText.seqlen
    seed: tuple[int, ...] = (CalibrationText.seed,)  # each is a calibration of its own
    bos: Bos = CalibrationText.bos
    eval: tuple[str, ...] = ()
    windows: int | None = EvaluationText.windows
    speed: bool = False
    agreement: bool = False  # it streams the dense model again beside each
    answers: int | None = None  # questions to ask it and the dense model beside it
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # documents of each task
    task_data: str | None = None

    def __post_init__(self) -> None:
        for what, values in (("method", self.methods), ("--data", self.data), ("seed", self.seed)):
            if not values:
                raise UsageError(f"a sweep needs at least one {what}")
        if not self.sparsity:
            raise UsageError("a sweep needs at least one --sparsity")
        if not self.eval:
            raise UsageError("a sweep needs a text to measure perplexity on; give --eval")
        for method in self.methods:
            self._check(method)
        names = [point.name for point in self.points(Compute())]
        if len(set(names)) < len(names):
            raise UsageError("a sweep has every method, every sparsity and every seed once")
        _ = self.evaluation  # checks its values
        if not self.tasks and (self.limit is not None or self.task_data is not None):
            raise UsageError("--limit and --task-data need --tasks")

    def points(self, compute: Compute) -> list[Point]:
        """Return all models, in the order in which they are made."""
        several = len(self.seed) > 1
        return [
            Point(
                f"{method['name']}-{sparsity:.4g}{f'-seed{seed}' if several else ''}",
                method["name"],
                self._settings(method, sparsity, seed, compute),
            )
            for method in self.methods
            for sparsity in self.sparsity
            for seed in self.seed
        ]

    @property
    def evaluation(self) -> EvaluationText:
        """What to measure on."""
        return from_names(EvaluationText, vars(self), seqlen=self.seqlen, bos=self.bos)

    @property
    def task_selection(self) -> TaskSelection | None:
        """Which tasks to score; None for none."""
        data = None if self.task_data is None else Path(self.task_data)
        return TaskSelection(self.tasks, self.limit, data=data) if self.tasks else None

    def to_toml(self) -> str:
        """Return the file's text; what is None is left out."""
        return tomli_w.dumps({key: each for key, each in vars(self).items() if each is not None})

    def _settings(
        self, method: Method, sparsity: float, seed: int, compute: Compute
    ) -> PruneSettings:
        given = {key: each for key, each in vars(self).items() if each is not None}
        return PruneSettings(
            from_names(Budget, {**method, **given}, sparsity=sparsity).for_goal(None),
            from_names(Criterion, method),
            from_names(CalibrationText, given, seed=seed),
            compute,
            method.get("repair", DEFAULT_REPAIR),
        )

    def _check(self, method: Method) -> None:
        name = method["name"]
        if not _NAME.fullmatch(name):
            raise UsageError(
                "the name of a method must do as that of a directory, with at most 64 characters, "
                f"found {name!r}"
            )
        try:
            means, known = (
                self._settings(each, 0.5, 0, Compute())
                for each in (method, METHODS.get(name, method))
            )
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        if means != known:
            raise UsageError(
                f"{name} is another method than the one of that name; give it another name, or "
                "the name alone, as a string"
            )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; refuse a file that is missing, no TOML, or has other keys or types."""
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot read the recipe {path}: {error}; a sweep leaves one in its directory"
        ) from error
    needed = [field.name for field in fields(Recipe) if field.default is MISSING]
    return Recipe(**_values(str(path), found, get_type_hints(Recipe), needed))


def _values(
    where: str, found: Mapping[str, Any], types: Mapping[str, Any], needed: list[str]
) -> dict[str, Any]:
    """Return what TOML says, in the types that are expected."""
    if unknown := sorted(set(found) - set(types)):
        raise UsageError(
            f"{where} has unknown keys: {', '.join(unknown)}; known are: {', '.join(types)}"
        )
    if missing := [name for name in needed if name not in found]:
        raise UsageError(f"{where} has no {' and no '.join(missing)}")
    return {key: _value(f"{where}: {key}", each, types[key]) for key, each in found.items()}


def _value(where: str, value: Any, expected: Any) -> Any:
    if expected == Method:
        if isinstance(value, dict):
            return _values(where, value, _OF_METHODS, ["name"])
        return method_named(_value(where, value, str))
    if get_origin(expected) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list, found {value!r}")
        return tuple(_value(where, each, get_args(expected)[0]) for each in value)
    if get_origin(expected) in (UnionType, Union):  # or None, which a file leaves out
        expected = get_args(expected)[0]
    if get_origin(expected) is Literal:
        expected = str
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise UsageError(f"{where} must be of type {expected.__name__}, found {value!r}")
    return value
