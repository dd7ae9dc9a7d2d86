"""`cfsp cache`: which converted models are kept on this machine, and how to get rid of them."""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, print_json, print_table


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "cache",
        "show the models that were converted from .gguf files and are kept for the next time",
        "cfsp cache --clear",
    )
    parser.add_argument(
        "--clear", action="store_true", help="delete them; they are converted again when needed"
    )


def run(args: argparse.Namespace) -> None:
    """Show the cache, or clear it."""
    from cfsp.checkpoint.cache import cached_models, clear_cache, converted_directory

    folder = converted_directory()
    models = clear_cache() if args.clear else cached_models()
    nbytes = sum(models.values())
    if args.json:
        entries = [{"name": path.name, "bytes": size} for path, size in models.items()]
        print_json(
            {"directory": str(folder), "models": entries, "bytes": nbytes, "cleared": args.clear}
        )
        return
    if not models:
        print(f"nothing is kept in {folder}")
        return
    print_table(
        ("model", "size"), [(path.name, human_bytes(size)) for path, size in models.items()]
    )
    verb = "deleted from" if args.clear else "kept in"
    print(f"\n{human_bytes(nbytes)} {verb} {folder}")
