"""The calibration windows of a model: its text, with its own processor where it has images."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import UsageError
from cfsp.settings import DEFAULT_TEXT
from cfsp.text.drawing import draw_text
from cfsp.text.image_windows import ProcessorOf
from cfsp.text.tokenizers import load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import CalibrationText
    from cfsp.text.windows import Windows

log = logging.getLogger(__name__)


def calibration_windows(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    processor: Any = None,
) -> Windows:
    """Draw the calibration windows, and say so if they are of the default text.

    `processor` is that of a multimodal model in memory; a checkpoint's is read where it is needed.
    """
    windows = draw_text(text, tokenizer, processor_of(source, processor))
    if text.names == (DEFAULT_TEXT,):
        log.info(
            "calibrating on %s, text of many kinds that comes with cfsp; text like what the model "
            "will read does better (--data)",
            DEFAULT_TEXT,
        )
    return windows


def processor_of(source: WeightSource, processor: Any = None) -> ProcessorOf | None:
    """Return what gives the processor of a multimodal model; None for a model that reads text."""
    if auto_class_of_type(source.config.model_type) != "AutoModelForImageTextToText":
        return None

    def load() -> Any:
        if processor is not None:
            return processor
        if not isinstance(source, Checkpoint):
            raise UsageError(
                "a text to calibrate on has images, which need the model's processor; give it in "
                "place of the tokenizer"
            )
        return load_processor(source.directory)

    return cache(load)
