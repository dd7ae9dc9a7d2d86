"""Run a study as it was published: `python studies/run.py 1 --texts DIR`.

Its recipe in `recipes/` says the question, the program and the options. Rows that are in
`results/` are not measured again, so that this prints the tables of docs/STUDIES.md; `--out FILE`
measures them anew. Any other option goes to the program and wins over the recipe's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from cfsp.errors import CfspError
from recipe import check_texts, read_recipes, recipe_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study and return the exit status: 2 for an error that the user can cure."""
    parser = _parser()
    args, more = parser.parse_known_args(arguments)
    try:
        recipe = recipe_of(args.study)
        check_texts(recipe, args.texts)
        print(f"{recipe.study}. {recipe.question}", flush=True)
        program = importlib.import_module(recipe.program)
        for command in recipe.commands(args.texts):
            program.main([*command, *more])
    except CfspError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {recipe.study}  {recipe.question}" for recipe in read_recipes())
    parser = argparse.ArgumentParser(
        prog="studies/run.py",
        description=f"Run a study as it was published:\n\n{known}",
        epilog="other options go to the study's program, see: python studies/PROGRAM.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="STUDY", help="its number")
    parser.add_argument(
        "--texts", metavar="DIR", type=Path, required=True, help="with wikitext2/ and c4/"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
