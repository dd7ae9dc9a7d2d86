"""What a study's command line says: which model, which texts, and how much of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser_of_model(study: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for the model, the texts and the results of a study.

    Args:
        study: its name; that of its file of results.
        description: the study's question.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="as for cfsp prune")
    parser.add_argument("--data", action="append", required=True, help="calibration text")
    parser.add_argument("--eval", action="append", required=True, help="text to measure on")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=6, help="windows to measure on, per text")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{study}.json", help="results")
    return parser


def conditions(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what all rows of a study have in common, without this machine's paths."""
    return {
        "data": [label(text) for text in args.data],
        "eval": [label(text) for text in args.eval],
        **{name: getattr(args, name) for name in ("samples", "seqlen", "windows")},
        "model": Path(args.model).name,  # a path says nothing elsewhere
        **more,
    }


def label(text: str) -> str:
    """Return a text's name without what is this machine's: the last two parts of a path."""
    path = Path(text)
    if not path.exists():
        return text
    return "/".join([*path.parts[-2:-1], path.stem])
