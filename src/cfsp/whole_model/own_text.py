"""Text that the model writes itself: calibration without any data set.

Every window is sampled at temperature 1 after the token that begins a text, so that it is drawn
from the model's own distribution. The whole model must be in memory.

Shapes: B windows in a batch, N windows, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import cache_argument
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import text_config_of
from cfsp.engine.decoder_end import text_model
from cfsp.errors import CalibrationError, TextError, UsageError
from cfsp.progress import item_progress
from cfsp.settings import DEFAULT_TEXT
from cfsp.text.drawing import draw_text
from cfsp.text.image_windows import ProcessorOf
from cfsp.text.tokenizers import load_processor
from cfsp.whole_model.load import load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.settings import CalibrationText
    from cfsp.text.windows import Windows

log = logging.getLogger(__name__)

# Windows that are written together; part of what a seed means.
_WINDOWS_IN_BATCH = 16


def first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a text begins after: BOS, or EOS for models that know no BOS.

    Raises:
        TextError: the model knows neither.
    """
    of_config = getattr(text_config_of(model.config), "bos_token_id", None)
    known = (tokenizer.bos_token_id, of_config, tokenizer.eos_token_id)
    for token in known:
        if isinstance(token, int):
            return token
    raise TextError(
        "the model can't write text for --data self: its tokenizer has no token that a text begins "
        "or ends with (BOS, EOS); give another --data"
    )


def own_windows(
    model: PreTrainedModel, first: int, *, count: int, seqlen: int, seed: int
) -> Tensor:
    """Return windows that the model wrote, as int64 [N, T]; the first token is not part of them.

    Where the model ends a text it goes on with what it thinks comes next. The same seed gives the
    same windows on one machine; elsewhere rounding may change a token, and then all after it.

    Args:
        model: a causal LM in evaluation mode.
        first: the token that a text begins after.
        count: windows N.
        seqlen: tokens T in a window.
        seed: of the sampling.

    Raises:
        CalibrationError: the model predicts NaN.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    predictor = text_model(model)
    written = []
    with torch.inference_mode(), item_progress("writing text", count * seqlen, "tok") as bar:
        for start in range(0, count, _WINDOWS_IN_BATCH):
            size = min(_WINDOWS_IN_BATCH, count - start)
            token_B1 = torch.full((size, 1), first)
            cache: dict[str, Any] = {cache_argument(predictor): DynamicCache(config=model.config)}
            tokens: list[Tensor] = []
            while len(tokens) < seqlen:
                tokens_B1 = token_B1.to(model.device)
                output = predictor(input_ids=tokens_B1, use_cache=True, logits_to_keep=1, **cache)
                token_B1 = _sample(output.logits[:, -1], generator)
                tokens.append(token_B1)
                bar.update(size)
            written.append(torch.cat(tokens, dim=1))
    return torch.cat(written)


def _sample(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    # On the CPU, whose generator is the same everywhere.
    probability_BV = logits_BV.float().softmax(-1).cpu()
    if not bool(torch.isfinite(probability_BV).all()):
        raise CalibrationError("the model predicts NaN; write its text with --dtype float32")
    return torch.multinomial(probability_BV, 1, generator=generator)


def calibration_windows(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    engine: Engine,
    processor: Any,
) -> Windows:
    """Draw the calibration windows, and say so if they are of the default text.

    The model may write some itself.

    Args:
        source: the model.
        tokenizer: its own.
        text: what to draw.
        engine: where and in what the model computes.
        processor: of a multimodal model in memory, for texts with images; that of a checkpoint
            is read where it is needed.
    """
    write = partial(write_own_text, source, tokenizer, engine)
    windows = draw_text(text, tokenizer, write, processor_of(source, processor))
    if text.names == (DEFAULT_TEXT,):
        log.info(
            "calibrating on %s, text of many kinds that comes with cfsp; text like what the model "
            "will read does better (--data)",
            DEFAULT_TEXT,
        )
    return windows


def processor_of(source: WeightSource, processor: Any = None) -> ProcessorOf | None:
    """Return what gives the processor of a multimodal model; None for a model that reads text.

    Args:
        source: the model.
        processor: if it is in memory.
    """
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


def write_own_text(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    *,
    count: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Let the model write windows of text; see `cfsp.whole_model.own_text`.

    Raises:
        UsageError: the model does not fit into memory.
        TextError: the model has no token that a text begins after.
        CalibrationError: the model predicts NaN.
    """
    # Before anything is written: can the model read texts so long?
    check_tokens(source.config, torch.zeros(1, seqlen, dtype=torch.int64), source.label)
    model = load_whole(source, engine, "--data self")
    first = first_token(model, tokenizer)
    return own_windows(model, first, count=count, seqlen=seqlen, seed=seed)
