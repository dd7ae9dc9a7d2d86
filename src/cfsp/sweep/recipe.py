"""A sweep as a value, and as a TOML file that gives the same sweep again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from cfsp.errors import UsageError
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.settings import (
    DEFAULT_TEXT,
    REPAIRS,
    Bos,
    Budget,
    BudgetOf,
    CalibrationText,
    Compute,
    Criterion,
    EvaluationText,
    PruneSettings,
    options_of,
)
from cfsp.sweep.methods import METHODS, Method, method_named

_CRITERION = options_of(Criterion)
_KNOWN: dict[str, Sequence[str | None]] = {
    "block_metric": _CRITERION["block_metric"].choices,
    "channel_metric": _CRITERION["channel_metric"].choices,
    "clamp": (None, *_CRITERION["clamp"].choices),
    "repair": REPAIRS,
    "removal": _CRITERION["removal"].choices,
}
# A method's name begins that of a directory.
_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,63}")


@dataclass(frozen=True)
class Point:
    """One model of a sweep.

    Attributes:
        name: of its directory.
        method: how it is pruned.
        sparsity: fraction to remove.
        seed: of the draw of its calibration windows.
    """

    name: str
    method: Method
    sparsity: float
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What a sweep does.

    Attributes:
        model: the model, as for prune.
        sparsity: fractions to remove.
        methods: how to prune; in a file each is a name that `cfsp.sweep.methods.method_named`
            knows or a table with the keys of `Method`.
        of: what the fractions are of, as for prune.
        multiple: widths become multiples of this, whatever the method; None for its own choice.
        data: calibration texts.
        samples: calibration windows in all.
        seqlen: tokens of a window, BOS included.
        seed: of the draws of windows; each is a calibration of its own.
        bos: whether windows begin with BOS, as for prune.
        eval: texts to measure perplexity on.
        eval_windows: windows of each.
        speed: also time each model against the dense one.
        agreement: also measure how far each model is from the dense one's predictions, which
            streams the dense model again beside each.
        tasks: tasks to score, as for eval; the dense model is scored, too.
        task_limit: documents of each task; None for all.
        task_data: directory of local task files; None for the harness's own data.
    """

    model: str
    sparsity: tuple[float, ...]
    methods: tuple[Method, ...] = (METHODS["cfsp"],)
    of: BudgetOf = Budget.of
    multiple: int | None = None
    data: tuple[str, ...] = (DEFAULT_TEXT,)
    samples: int | None = None
    seqlen: int = CalibrationText.seqlen
    seed: tuple[int, ...] = (CalibrationText.seed,)
    bos: Bos = CalibrationText.bos
    eval: tuple[str, ...] = ()
    eval_windows: int | None = EvaluationText.windows
    speed: bool = False
    agreement: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
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
            _check_method(method)
        names = [point.name for point in self.points]
        if len(set(names)) < len(names):
            raise UsageError("a sweep has every method, every sparsity and every seed once")
        for point in self.points:
            self.settings(point, Compute())
        assert self.evaluation
        if not self.tasks and (self.task_limit is not None or self.task_data is not None):
            raise UsageError("--task-limit and --task-data need --tasks")

    @property
    def points(self) -> list[Point]:
        """All models, in the order in which they are made."""
        several = len(self.seed) > 1
        return [
            Point(
                f"{method.name}-{sparsity:.4g}{f'-seed{seed}' if several else ''}",
                method,
                sparsity,
                seed,
            )
            for method in self.methods
            for sparsity in self.sparsity
            for seed in self.seed
        ]

    @property
    def evaluation(self) -> EvaluationText:
        """What to measure on."""
        return EvaluationText(self.eval, self.eval_windows, self.seqlen, bos=self.bos)

    @property
    def task_selection(self) -> TaskSelection | None:
        """Which tasks to score; None for none.

        Raises:
            CfspError: the limit or the directory is none.
        """
        if not self.tasks:
            return None
        data = None if self.task_data is None else Path(self.task_data)
        return TaskSelection(self.tasks, self.task_limit, data=data)

    def text(self, seed: int) -> CalibrationText:
        """Return what to calibrate on."""
        return CalibrationText(self.data, self.samples, self.seqlen, seed, self.bos)

    def settings(self, point: Point, compute: Compute) -> PruneSettings:
        """Return how to prune one model.

        Raises:
            UsageError: a value is outside its range.
        """
        method = point.method
        return PruneSettings(
            Budget(
                point.sparsity,
                self.of,
                self.multiple or method.multiple,
                parts=method.parts,
                remove_blocks=method.remove_blocks,
                remove_attentions=method.remove_attentions,
                remove_experts=method.remove_experts,
            ),
            Criterion(method.block_metric, method.channel_metric, method.clamp, method.removal),
            self.text(point.seed),
            compute,
            method.repair,
        )

    def to_toml(self) -> str:
        """Return the file's text; what is None is left out."""
        return tomli_w.dumps(_without_none(asdict(self)))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: the file is missing, no TOML, or has other keys or types.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot read the recipe {path}: {error}; a sweep leaves one in its directory"
        ) from error
    return Recipe(**_values(str(path), found, Recipe))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, tuple) else value


def _check_method(method: Method) -> None:
    if not _NAME.fullmatch(method.name):
        raise UsageError(
            f"the name of a method must do as that of a directory, with at most 64 characters, "
            f"found {method.name!r}"
        )
    if METHODS.get(method.name, method) != method:
        raise UsageError(
            f"{method.name} is another method than the one of that name; give it another name, or "
            "the name alone, as a string"
        )
    for key, known in _KNOWN.items():
        if (value := getattr(method, key)) not in known:
            names = ", ".join(each for each in known if each)
            raise UsageError(f"{method.name}: unknown {key} {value!r}; known are: {names}")


# From TOML to the types that the fields have.


def _values(where: str, found: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass, checked."""
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(found) - set(known)):
        raise UsageError(
            f"{where} has unknown keys: {', '.join(unknown)}; known are: {', '.join(known)}"
        )
    required = [name for name, field in known.items() if field.default is MISSING]
    if missing := [name for name in required if name not in found]:
        raise UsageError(f"{where} has no {' and no '.join(missing)}")
    types = get_type_hints(kind)
    return {key: _value(f"{where}: {key}", value, types[key]) for key, value in found.items()}


def _value(where: str, value: Any, expected: Any) -> Any:
    if expected is Method:
        return _method(where, value)
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


def _method(where: str, value: Any) -> Method:
    """Return the method that a name or a table stands for."""
    if isinstance(value, dict):
        return Method(**_values(where, value, Method))
    try:
        return method_named(_value(where, value, str))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
