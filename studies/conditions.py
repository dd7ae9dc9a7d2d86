"""What a study's command line says: which model, which texts, and how much of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cfsp.settings import CalibrationText
from subject import label

RESULTS = Path(__file__).parent / "results"


def parser_of_texts(study: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for the texts and the results of any study.

    Args:
        study: its name; that of its file of results.
        description: the study's question.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", action="append", required=True, help="calibration text")
    parser.add_argument("--eval", action="append", required=True, help="text to measure on")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=6, help="windows to measure on, per text")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{study}.json", help="results")
    return parser


def parser_of_model(study: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for a study of one model that is there already."""
    parser = parser_of_texts(study, description)
    parser.add_argument("--model", default="demo", help="as for cfsp prune")
    return parser


def conditions(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what all rows of a study have in common, without this machine's paths."""
    found = {
        "data": [label(text) for text in args.data],
        "eval": [label(text) for text in args.eval],
        **{name: getattr(args, name) for name in ("samples", "seqlen", "windows")},
    }
    if "model" in args:
        # A path says nothing elsewhere.
        found["model"] = Path(args.model).name
    return {**found, **more}


def calibration_text(args: argparse.Namespace) -> CalibrationText:
    """Return what to calibrate on."""
    return CalibrationText(tuple(args.data), args.samples, args.seqlen)
