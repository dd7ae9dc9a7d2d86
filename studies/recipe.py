"""A study as a TOML file: its question, its program, and the options it was published with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import TextError, UsageError

RECIPES = Path(__file__).parent / "recipes"
# What a recipe calls the directory of texts.
_DIRECTORY = "DIR/"


@dataclass(frozen=True)
class Recipe:
    """What a study does.

    Attributes:
        study: its number.
        question: what it asks.
        program: the module that measures it.
        data: calibration texts; one that begins with `DIR/` is a file of the directory of texts.
        eval: texts to measure on, likewise.
        runs: options of each run of the program, without their dashes.
    """

    study: str
    question: str
    program: str
    data: tuple[str, ...]
    eval: tuple[str, ...]
    runs: tuple[Mapping[str, Any], ...]

    @property
    def files(self) -> list[str]:
        """The files that the directory of texts must have."""
        names = (*self.data, *self.eval)
        return [n.removeprefix(_DIRECTORY) for n in names if n.startswith(_DIRECTORY)]

    def commands(self, texts: Path) -> list[list[str]]:
        """Return the command line of each run of the program.

        Args:
            texts: the directory of texts.
        """
        common = []
        for option, names in (("--data", self.data), ("--eval", self.eval)):
            for name in names:
                common += [option, name.replace(_DIRECTORY, f"{texts}/", 1)]
        return [[*common, *_arguments(options)] for options in self.runs]


def _arguments(options: Mapping[str, Any]) -> list[str]:
    found = []
    for option, value in options.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{option}", *map(str, values)]
    return found


def read_recipes() -> list[Recipe]:
    """Read all recipes, in the order of their numbers."""
    return sorted(map(_read, RECIPES.glob("*.toml")), key=lambda recipe: int(recipe.study))


def recipe_of(study: str) -> Recipe:
    """Return the recipe of a study.

    Raises:
        UsageError: there is none of this number.
    """
    known = {recipe.study: recipe for recipe in read_recipes()}
    if study not in known:
        raise UsageError(f"there is no study {study!r}; known are: {', '.join(known)}")
    return known[study]


def check_texts(recipe: Recipe, texts: Path) -> None:
    """Check that the directory of texts has what a recipe names.

    Raises:
        TextError: a file is missing.
    """
    for name in recipe.files:
        if not (texts / name).is_file():
            raise TextError(
                f"study {recipe.study} reads {texts / name}, which is not there; --texts is a "
                f"directory with {', '.join(sorted(set(recipe.files)))}"
            )


def _read(path: Path) -> Recipe:
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(found.pop(name)) for name in ("data", "eval", "runs")}
    return Recipe(study=path.name.split("-")[0], **found, **lists)
