"""Check that the files of a checkpoint are those that cfsp wrote, by its manifest.

cfsp verify smaller
"""

from __future__ import annotations

import argparse

from cfsp.cli.options import Parser, add_model
from cfsp.cli.output import Told


def add_options_to(parser: Parser) -> None:
    add_model(parser)


def run(args: argparse.Namespace) -> Told:
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.result.manifest import check_as_written

    source = open_checkpoint(args.model)
    count = check_as_written(source)
    told = {"verified": True, "files": count}
    return told, lambda: print(f"{source.label}: {count} files are as they were written")
