"""Calibration windows of texts by name, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfsp.settings import CalibrationText, Text
from cfsp.text.drawing import draw_left_over, draw_text
from cfsp.text.windows import Windows


def draw_windows(
    texts: Sequence[str | Text], tokenizer: Any, *, processor: Any = None, **choices: Any
) -> Windows:
    """Draw windows; `choices` are those of `CalibrationText`."""
    return draw_text(CalibrationText(tuple(texts), **choices), tokenizer, processor)


def windows_left_over(
    texts: Sequence[str | Text], tokenizer: Any, count: int, **choices: Any
) -> Windows:
    """Draw windows that `draw_windows` with the same choices does not draw."""
    return draw_left_over(CalibrationText(tuple(texts), **choices), tokenizer, count)
