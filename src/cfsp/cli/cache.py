"""Show the models that were converted from .gguf files and are kept for the next time.

cfsp cache --clear
"""

from __future__ import annotations

import argparse

from cfsp.cli.options import Parser
from cfsp.cli.output import Told, human_bytes, print_table


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    parser.add_argument(
        "--clear", action="store_true", help="delete them; they are converted again when needed"
    )


def run(args: argparse.Namespace) -> Told:
    """Show the cache, or clear it."""
    from cfsp.checkpoint.cache import cached_models, clear_cache, converted_directory

    folder = converted_directory()
    models = clear_cache() if args.clear else cached_models()
    nbytes = sum(models.values())
    entries = [{"name": path.name, "bytes": size} for path, size in models.items()]

    def say() -> None:
        if not models:
            print(f"nothing is kept in {folder}")
            return
        rows = [(path.name, human_bytes(size)) for path, size in models.items()]
        print_table(("model", "size"), rows)
        print(f"\n{human_bytes(nbytes)} {'deleted from' if args.clear else 'kept in'} {folder}")

    found = {"directory": str(folder), "models": entries, "bytes": nbytes, "cleared": args.clear}
    return found, say
