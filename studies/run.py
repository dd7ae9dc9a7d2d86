"""Run a study as it was published: `python studies/run.py 9 --texts DIR`.

Its recipe in `recipes/` says the question, the program, the texts and the options; a text that
begins with `DIR/` is a file of the directory of texts. Rows that are in `results/` are not measured
again, so that this prints the tables of docs/STUDIES.md; `--out FILE` measures them anew. Any other
option goes to the program and wins over the recipe's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import CfspError, TextError

RECIPES = {
    path.name.split("-")[0]: path for path in Path(__file__).parent.glob("recipes/[0-9]*.toml")
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study and return the exit status: 2 for an error that the user can cure."""
    parser = argparse.ArgumentParser(
        prog="studies/run.py",
        description="Run a study as it was published.",
        epilog="other options go to the study's program, see: python studies/PROGRAM.py --help",
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=RECIPES, help="its number in docs/STUDIES.md")
    parser.add_argument(
        "--texts", metavar="DIR", type=Path, required=True, help="with wikitext2/, c4/ and domains/"
    )
    args, more = parser.parse_known_args(arguments)
    recipe = tomllib.loads(RECIPES[args.study].read_text(encoding="utf-8"))
    try:
        texts = _texts_of(recipe, args.texts)
        print(f"{args.study}. {recipe['question']}", flush=True)
        program = importlib.import_module(recipe["program"])
        for options in recipe["runs"]:
            program.main([*texts, *_arguments(options), *more])
    except CfspError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _texts_of(recipe: dict[str, Any], directory: Path) -> list[str]:
    """Return the options that name a recipe's texts.

    Raises:
        TextError: a file is missing.
    """
    found = []
    for kind in ("data", "eval"):
        for name in recipe[kind]:
            path = directory / name.removeprefix("DIR/")
            if name.startswith("DIR/") and not path.is_file():
                raise TextError(f"{path} is not there; --texts is a directory that has it")
            found += [f"--{kind}", str(path) if name.startswith("DIR/") else name]
    return found


def _arguments(options: dict[str, Any]) -> list[str]:
    found = []
    for option, value in options.items():
        found += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return found


if __name__ == "__main__":
    sys.exit(main())
