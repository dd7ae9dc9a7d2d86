"""Windows with images: what a model's own processor makes of conversations that have some.

All windows are equally long and none is padded, with images or without. A window has as many whole
samples as fit, and is cut after T tokens where the last one goes on; an image is never cut. Where
the next sample's image does not fit any more, the window goes on with the text of the samples that
follow, without their images. A sample whose images alone are longer than a window is left out.

Shapes: T tokens, R tokens of a sample or of several.
"""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cfsp.errors import MissingExtraError, TextError
from cfsp.text.records import CHAT_COLUMN, Sample
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from cfsp.text.sources import TextSource

logger = logging.getLogger(__name__)

# Loads the processor of a model.
ProcessorOf = Callable[[], Any]

# What a processor gives besides, and the model does not need: windows are not padded.
_NOT_NEEDED = ("input_ids", "attention_mask", "labels")
# How many samples are held to be drawn from, for each window: images are too large to hold all.
_SAMPLES_TOGETHER = 4


def open_image(value: Any, where: str) -> Any:
    """Return a picture of Pillow, in RGB, of a path, bytes or a picture."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("reading images", "images") from error
    if hasattr(value, "convert"):
        return value.convert("RGB")
    named = value if isinstance(value, Path) else f"of {len(value)} bytes"
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise TextError(
            f"{where}: there is no image {named}; paths are relative to the file that names them"
        ) from error
    except Exception as error:  # Pillow raises many types for what is no picture
        raise TextError(
            f"{where}: image {named} cannot be read ({type(error).__name__}: {error})"
        ) from error


def image_windows(
    source: TextSource,
    processor: Any,
    seqlen: int,
    begins_with: tuple[int, ...],
    counts: tuple[int, int],
    generator: torch.Generator,
) -> Windows:
    """Return windows of a text's conversations: `counts` are needed and wanted."""
    least, count = counts
    samples = _shuffled(source.samples(), generator, _SAMPLES_TOGETHER * count)
    left_out: list[int] = []
    found = list(islice(_filled(samples, processor, seqlen, begins_with, left_out), count))
    cure = "give more samples, fewer --samples or a shorter --seqlen"
    if left_out:
        logger.warning(
            "%d samples were left out, whose images need up to %d tokens: more than a window "
            "has (--seqlen %d)",
            *(len(left_out), max(left_out), seqlen),
        )
        cure = (
            f"{len(left_out)} samples have images that need up to {max(left_out)} tokens: "
            "raise --seqlen to at least that, or give smaller images"
        )
    if len(found) < least:
        raise TextError(
            f"{source.name} holds {len(found)} windows of {seqlen} tokens with images, {count} "
            f"are needed; {cure}"
        )
    tokens_NT = torch.stack([made.tokens_R[:seqlen] for made in found])
    images_N = tuple(made.beside_tokens(seqlen) for made in found)
    return Windows(tokens_NT, {source.name: len(found)}, begins_with, images_N=images_N)


def _shuffled(
    samples: Iterator[Sample], generator: torch.Generator, together: int
) -> Iterator[Sample]:
    while chunk := list(islice(samples, together)):
        for position in torch.randperm(len(chunk), generator=generator).tolist():
            yield chunk[position]


@dataclass(frozen=True)
class _Inputs:
    """What a processor made of samples: token ids, values of every token and of the images."""

    tokens_R: Tensor
    by_token: Mapping[str, Tensor] = field(default_factory=dict)  # [1, R], such as a type
    images: Mapping[str, Tensor] = field(default_factory=dict)
    images_end: int = 0  # tokens up to the end of the last image

    def between(self, before: Sequence[int], after: Sequence[int]) -> _Inputs:
        """Return these inputs with the tokens of text before and after them."""
        tokens = [torch.tensor([*before]).long(), self.tokens_R, torch.tensor([*after]).long()]
        # Text is of type 0 where tokens have types.
        sides = (len(before), len(after))
        by_token = {name: pad(value, sides) for name, value in self.by_token.items()}
        images_end = self.images_end and len(before) + self.images_end
        return _Inputs(torch.cat(tokens), by_token, self.images, images_end)

    def beside_tokens(self, seqlen: int) -> Mapping[str, Tensor]:
        """Return what the model is given of the first tokens besides them."""
        if not self.images_end:
            return {}
        by_token = {name: value[:, :seqlen] for name, value in self.by_token.items()}
        return {**by_token, **self.images}


def _filled(
    samples: Iterator[Sample],
    processor: Any,
    seqlen: int,
    begins_with: tuple[int, ...],
    left_out: list[int],
) -> Iterator[_Inputs]:
    """Yield the inputs of whole windows or more; note the tokens of what is left out."""
    waiting: deque[Sample] = deque()
    chosen: list[Sample] = []
    # Those of which this window has the text alone: a later one has their images.
    later: list[Sample] = []
    made = _Inputs(torch.empty(0))
    while sample := waiting.popleft() if waiting else next(samples, None):
        longer = None if later else _together([*chosen, sample], processor, begins_with)
        if longer and longer.images_end <= seqlen:
            chosen.append(sample)
            made = longer
        elif longer and not chosen:
            left_out.append(longer.images_end)
        else:
            later.append(sample)
            plain = _rendered(sample, processor, with_images=False)
            ids = processor.tokenizer(plain, add_special_tokens=False)["input_ids"]
            made = made.between((), ids)
        if len(made.tokens_R) >= seqlen:
            yield made
            waiting.extendleft(reversed(later))
            chosen, later, made = [], [], _Inputs(torch.empty(0))


def _together(samples: Sequence[Sample], processor: Any, begins_with: tuple[int, ...]) -> _Inputs:
    """Return what a processor makes of samples one after the other, begun as an input is."""
    text = "".join(_rendered(sample, processor) for sample in samples)
    images = [image for sample in samples for image in sample.images]
    made = _inputs(text, images, samples[-1].where, processor)
    # Templates and processors write the beginning themselves, at a place of their own.
    if begins_with and begins_with[0] not in made.tokens_R.tolist():
        made = made.between(begins_with, ())
    return made


def _inputs(text: str, images: Sequence[Any], where: str, processor: Any) -> _Inputs:
    pictures = [open_image(image, where) for image in images]
    kind = type(processor).__name__
    try:
        if not images:
            ids = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return _Inputs(torch.tensor(ids, dtype=torch.int64))
        made = processor(
            text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False
        )
        others = {
            name: torch.as_tensor(value) for name, value in made.items() if name not in _NOT_NEEDED
        }
    except ImportError as error:
        raise MissingExtraError("reading images", "images") from error
    except Exception as error:  # processors raise what they like
        raise TextError(
            f"{where}: the model's processor ({kind}) does not take this text with {len(images)} "
            f"images: {str(error).splitlines()[0][:200]}"
        ) from error
    tokens_R = made["input_ids"][0]
    # The tokens that stand for a part of an image.
    found = [*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)]
    found.append(getattr(processor.tokenizer, "image_token_id", None))
    of_images = torch.isin(tokens_R, torch.tensor([each for each in found if each is not None]))
    if not bool(of_images.any()):
        raise TextError(
            f"{where}: the model's processor ({kind}) put no tokens of an image into the text; "
            "give text alone"
        )
    by_token = {name: v for name, v in others.items() if v.shape == made["input_ids"].shape}
    of_pictures = {name: value for name, value in others.items() if name not in by_token}
    return _Inputs(tokens_R, by_token, of_pictures, int(of_images.nonzero()[-1]) + 1)


def _rendered(sample: Sample, processor: Any, *, with_images: bool = True) -> str:
    """Return a sample as text, with the processor's own places for images."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise TextError(
            f"the model's processor has no chat template, which {CHAT_COLUMN!r} need; give text, "
            "or an instruct model"
        )
    messages = [
        {
            **message,
            "content": [p for p in message["content"] if with_images or p["type"] == "text"],
        }
        for message in sample.messages
    ]
    try:
        text: str = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise TextError(f"{sample.where}: does not fit the chat template: {error}") from error
    return text
