"""Windows with images: what a model's own processor makes of conversations that have some.

All windows are equally long and none is padded, with images or without. A window has as many whole
samples as fit, and is cut after T tokens where the last one goes on; an image is never cut. Where
the next sample's image does not fit any more, the window goes on with the text of the samples that
follow, without their images. A sample whose images alone are longer than a window is left out.

Shapes: T tokens, R tokens of a sample or of several.
"""

from __future__ import annotations

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

from cfsp.errors import MissingExtraError, TextError, UsageError
from cfsp.text.chats import CHAT_COLUMN
from cfsp.text.images import Sample, open_image
from cfsp.text.tokenizers import is_processor
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Loads the processor of a model.
ProcessorOf = Callable[[], Any]

# What a processor gives besides, and the model does not need: windows are not padded.
_NOT_NEEDED = ("input_ids", "attention_mask", "labels")
# How many samples are held to be drawn from, for each window: images are too large to hold all.
_SAMPLES_TOGETHER = 4


def parted(given: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return the tokenizer, and the processor or None, of what a user gives as either.

    Raises:
        UsageError: it is the name of one.
    """
    if isinstance(given, str | Path):
        raise UsageError(
            "expected the tokenizer itself, such as AutoTokenizer.from_pretrained gives, found "
            f"{str(given)!r}"
        )
    return (given.tokenizer, given) if is_processor(given) else (given, None)


@dataclass(frozen=True)
class _Inputs:
    """What a processor made of samples: token ids, values of every token and of the images.

    Attributes:
        tokens_R: token ids.
        by_token: values of every token, [1, R], such as its type.
        images: values of the images.
        images_end: tokens up to the end of the last image.
    """

    tokens_R: Tensor
    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    images_end: int = 0

    def between(self, before: Sequence[int], after: Sequence[int]) -> _Inputs:
        """Return these inputs with the tokens of text before and after them."""
        # Text is of type 0 where tokens have types.
        sides = (len(before), len(after))
        return _Inputs(
            torch.cat(
                [torch.tensor([*before]).long(), self.tokens_R, torch.tensor([*after]).long()]
            ),
            {name: pad(value, sides) for name, value in self.by_token.items()},
            self.images,
            self.images_end and len(before) + self.images_end,
        )


@dataclass(frozen=True)
class _Piece:
    """A sample as text, and how many tokens it has: in all, and up to the end of its images."""

    sample: Sample
    text: str
    length: int
    images_end: int


@dataclass
class ImageWindows:
    """Fills windows with samples, one after the other, until there are no more.

    Attributes:
        samples: in the source's own order.
        processor: of the model.
        seqlen: tokens T in a window.
        begins_with: token ids that an input of the model begins with.
    """

    samples: Iterator[Sample]
    processor: Any
    seqlen: int
    begins_with: tuple[int, ...]
    _left_out: int = 0
    _needed: int = 0
    _waiting: deque[_Piece] = field(default_factory=deque)

    def draw(self, name: str, count: int, least: int, generator: torch.Generator) -> Windows:
        """Return `count` windows of a text, or as many as there are, of samples in another order.

        Raises:
            TextError: there are fewer than `least`, or a sample is not what the processor takes.
            MissingExtraError: the processor needs Pillow or torchvision.
        """
        self.samples = _shuffled(self.samples, generator, _SAMPLES_TOGETHER * count)
        found = list(islice(iter(self._next, None), count))
        if self._left_out:
            logger.warning(
                "%d samples were left out, whose images need up to %d tokens: more than a window "
                "has (--seqlen %d)",
                *(self._left_out, self._needed, self.seqlen),
            )
        if len(found) < least:
            cure = "give more samples, fewer --samples or a shorter --seqlen"
            if self._left_out:
                cure = (
                    f"{self._left_out} samples have images that need up to {self._needed} tokens: "
                    "raise --seqlen to at least that, or give smaller images"
                )
            raise TextError(
                f"{name} holds {len(found)} windows of {self.seqlen} tokens with images, {count} "
                f"are needed; {cure}"
            )
        tokens_NT = torch.stack([made.tokens_R[: self.seqlen] for made in found])
        images_N = tuple(map(self._images_of, found))
        return Windows(tokens_NT, {name: len(found)}, self.begins_with, images_N=images_N)

    def _images_of(self, made: _Inputs) -> Mapping[str, Tensor]:
        """Return what the model is given of a window besides its tokens."""
        if not made.images_end:
            return {}
        by_token = {name: value[:, : self.seqlen] for name, value in made.by_token.items()}
        return {**by_token, **made.images}

    def _next(self) -> _Inputs | None:
        """Return the inputs of a whole window or more; None if there are not so many."""
        room = self.seqlen - len(self.begins_with)
        chosen: list[_Piece] = []
        used = 0
        while used < room and (piece := self._piece(0)) is not None:
            if used + piece.images_end > room:
                break
            chosen.append(self._waiting.popleft())
            used += piece.length
        if not chosen:
            return None
        made = self._made(chosen)
        # Tokens at the seams may differ from those of the samples one by one.
        while made.images_end > self.seqlen:
            self._waiting.appendleft(chosen.pop())
            made = self._made(chosen)
        position = 0
        while len(made.tokens_R) < self.seqlen:
            if (piece := self._piece(position)) is None:
                return None
            plain = _rendered(piece.sample, self.processor, with_images=False)
            ids = self.processor.tokenizer(plain, add_special_tokens=False)["input_ids"]
            made = made.between((), ids)
            position += 1
        return made

    def _made(self, chosen: Sequence[_Piece]) -> _Inputs:
        text = "".join(piece.text for piece in chosen)
        images = [image for piece in chosen for image in piece.sample.images]
        made = _inputs(text, images, chosen[0].sample.where, self.processor)
        begin = self.begins_with
        # Templates and processors write it themselves, at a place of their own.
        if begin and begin[0] not in made.tokens_R[: chosen[0].length].tolist():
            made = made.between(begin, ())
        return made

    def _piece(self, position: int) -> _Piece | None:
        """Return a sample that no window has yet, by its position among them."""
        while len(self._waiting) <= position:
            sample = next(self.samples, None)
            if sample is None:
                return None
            text = _rendered(sample, self.processor)
            made = _inputs(text, sample.images, sample.where, self.processor)
            needed = made.images_end + len(self.begins_with)
            if needed > self.seqlen:
                self._left_out, self._needed = self._left_out + 1, max(self._needed, needed)
            else:
                self._waiting.append(_Piece(sample, text, len(made.tokens_R), made.images_end))
        return self._waiting[position]


def _shuffled(
    samples: Iterator[Sample], generator: torch.Generator, together: int
) -> Iterator[Sample]:
    """Yield samples in another order, so many at a time."""
    while chunk := list(islice(samples, together)):
        for position in torch.randperm(len(chunk), generator=generator).tolist():
            yield chunk[position]


def _inputs(text: str, images: Sequence[Any], where: str, processor: Any) -> _Inputs:
    """Return what a processor makes of a text with places for images.

    Raises:
        TextError: the processor refuses it.
        MissingExtraError: it needs Pillow or torchvision.
    """
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
    of_images = torch.isin(tokens_R, torch.tensor(_image_tokens(processor)))
    if not bool(of_images.any()):
        raise TextError(
            f"{where}: the model's processor ({kind}) put no tokens of an image into the text; "
            "give text alone"
        )
    by_token = {name: v for name, v in others.items() if v.shape == made["input_ids"].shape}
    of_pictures = {name: value for name, value in others.items() if name not in by_token}
    return _Inputs(tokens_R, by_token, of_pictures, int(of_images.nonzero()[-1]) + 1)


def _image_tokens(processor: Any) -> list[int]:
    """Return the ids of tokens that stand for a part of an image."""
    found = [*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)]
    found.append(getattr(processor.tokenizer, "image_token_id", None))
    return [token for token in found if isinstance(token, int)]


def _rendered(sample: Sample, processor: Any, *, with_images: bool = True) -> str:
    """Return a sample as text, with the processor's own places for images.

    Raises:
        TextError: there is no chat template, or the sample does not fit it.
    """
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
