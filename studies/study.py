"""A study while it runs: its rows, and a model and calibrations that are made when first needed.

A study whose rows are all there prints them without a model.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from typing import Any

from cfsp.calibration.statistics import Statistics
from conditions import calibration_text, conditions
from results import Results
from subject import Subject, label, load_subject


class Study:
    """What the programs of one model have in common.

    Attributes:
        args: the command line.
        texts: labels of the texts that the model is judged by.
        results: the rows so far.
    """

    def __init__(self, args: argparse.Namespace, **more: Any) -> None:
        """Open the results.

        Args:
            args: the command line.
            more: conditions of this study alone.

        Raises:
            OutputError: the results were measured under other conditions.
        """
        self.args = args
        self.texts = [label(text) for text in args.eval]
        self.results = Results(args.out, conditions(args, **more))

    @cached_property
    def subject(self) -> Subject:
        """The model."""
        args = self.args
        return load_subject(args.model, args.eval, args.windows, args.seqlen)

    @cached_property
    def statistics(self) -> Statistics:
        """The statistics of the calibration text."""
        return self.subject.calibrate(calibration_text(self.args))
