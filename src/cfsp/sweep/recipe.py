"""A sweep as a value, and as a TOML file that gives the same sweep again."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cfsp.errors import UsageError
from cfsp.settings import Bos, Budget, CalibrationText, EvaluationText, check_bos
from cfsp.sweep.methods import Method, method


@dataclass(frozen=True)
class Point:
    """One model of a sweep: a method at a sparsity."""

    method: str
    sparsity: float

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.method}-{self.sparsity:.4g}"


@dataclass(frozen=True)
class Recipe:
    """What a sweep does.

    Attributes:
        model: the model, as for prune.
        sparsity: fractions to remove.
        methods: names of `cfsp.sweep.methods.METHODS`.
        of: what the fractions are of, as for prune.
        multiple: widths become multiples of this, whatever the method; None for its own choice.
        data: calibration texts.
        samples: calibration windows in all.
        seqlen: tokens of a window, BOS included.
        seed: of the draw of windows.
        bos: whether windows begin with BOS, as for prune.
        eval: texts to measure perplexity on.
        eval_windows: windows of each.
        speed: also time each model against the dense one.
    """

    model: str
    sparsity: tuple[float, ...]
    methods: tuple[str, ...] = ("cfsp",)
    of: str = "ffn"
    multiple: int | None = None
    data: tuple[str, ...] = ("python-docs",)
    samples: int | None = None
    seqlen: int = 1024
    seed: int = 0
    bos: Bos = "auto"
    eval: tuple[str, ...] = ()
    eval_windows: int = 12
    speed: bool = False

    def __post_init__(self) -> None:
        if not self.sparsity:
            raise UsageError("a sweep needs at least one --sparsity")
        if not self.eval:
            raise UsageError("a sweep needs a text to measure perplexity on; give --eval")
        check_bos(self.bos)
        for point in self.points:
            self.budget(point)
        names = [point.name for point in self.points]
        if len(set(names)) < len(names):
            raise UsageError("a sweep has every method and every sparsity once")

    @property
    def points(self) -> list[Point]:
        """All models, in the order in which they are made."""
        return [Point(name, sparsity) for name in self.methods for sparsity in self.sparsity]

    @property
    def text(self) -> CalibrationText:
        """What to calibrate on."""
        return CalibrationText(self.data, self.samples, self.seqlen, self.seed, self.bos)

    @property
    def evaluation(self) -> EvaluationText:
        """What to measure on."""
        return EvaluationText(self.eval, self.eval_windows, self.seqlen, bos=self.bos)

    def budget(self, point: Point) -> Budget:
        """Return how much a point removes.

        Raises:
            UsageError: it is no fraction, or the method is unknown.
        """
        chosen: Method = method(point.method)
        return Budget(point.sparsity, self.of, self.multiple or chosen.multiple)  # type: ignore[arg-type]

    def to_toml(self) -> str:
        """Return the file's text; what is None is left out."""
        # JSON's strings, numbers, booleans and flat lists are TOML's too.
        lines = [f"{k} = {json.dumps(v)}" for k, v in asdict(self).items() if v is not None]
        return "\n".join(lines) + "\n"


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: the file is missing, no TOML, or has other keys or types.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot read the recipe {path}: {error}; a sweep leaves one in its directory"
        ) from error
    known = {field.name: field for field in fields(Recipe)}
    if unknown := sorted(set(found) - set(known)):
        raise UsageError(
            f"{path} has unknown keys: {', '.join(unknown)}; known are: {', '.join(known)}"
        )
    if missing := {"model", "sparsity"} - set(found):
        raise UsageError(f"{path} has no {' and no '.join(sorted(missing))}")
    return Recipe(**{key: _checked(path, key, value) for key, value in found.items()})


_STRINGS, _NUMBERS = {"methods", "data", "eval"}, {"sparsity"}
_TYPES = {
    "model": str,
    "of": str,
    "multiple": int,
    "samples": int,
    "seqlen": int,
    "seed": int,
    "bos": str,
    "eval_windows": int,
    "speed": bool,
}


def _checked(path: Path, key: str, value: Any) -> Any:
    if key in _STRINGS or key in _NUMBERS:
        expected: Any = str if key in _STRINGS else (int, float)
        if isinstance(value, list) and all(
            isinstance(item, expected) and not isinstance(item, bool) for item in value
        ):
            return tuple(value if key in _STRINGS else map(float, value))
        what = "strings" if key in _STRINGS else "numbers"
        raise UsageError(f"{path}: {key} must be a list of {what}, found {value!r}")
    if type(value) is not _TYPES[key]:
        raise UsageError(f"{path}: {key} must be of type {_TYPES[key].__name__}, found {value!r}")
    return value
