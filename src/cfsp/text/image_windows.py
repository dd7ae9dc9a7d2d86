"""Windows with images: what a model's own processor makes of samples, as many as fill a window.

All windows are equally long and none is padded, with images or without. A window has as many whole
samples as fit, and is cut after T tokens where the last one goes on; an image is never cut. Where
the next sample's image does not fit any more, the window goes on with the text of the samples that
follow, without their images. A sample whose images alone are longer than a window is left out.

Shapes: T tokens, R tokens of a sample or of several.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.errors import MissingExtraError, OutputError, TextError, UsageError
from cfsp.text.chats import CHAT_COLUMN
from cfsp.text.images import Sample, open_image
from cfsp.text.tokenizers import is_processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Loads the processor of a model.
ProcessorOf = Callable[[], Any]

_ALIGNMENT = 64

# What a processor gives besides, and the model does not need: windows are not padded.
_NOT_NEEDED = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class ImageWindow:
    """A window.

    Attributes:
        tokens_T: token ids.
        images: what the model is given besides; nothing if there is no image.
    """

    tokens_T: Tensor
    images: Mapping[str, Tensor]


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


@dataclass
class ImageWindows:
    """Fills windows with samples, one after the other, until there are no more.

    Args:
        samples: in the order in which they are taken.
        processor: of the model.
        seqlen: tokens T in a window.
        begins_with: token ids that an input of the model begins with.

    Attributes:
        left_out: samples whose images alone are longer than a window.
        needed: tokens that the longest of these would need.
    """

    samples: Iterator[Sample]
    processor: Any
    seqlen: int
    begins_with: Sequence[int]
    left_out: int = 0
    needed: int = 0
    _waiting: deque[_Piece] = field(default_factory=deque)

    def take(self, count: int) -> list[ImageWindow]:
        """Return so many windows, or as many as there are.

        Raises:
            TextError: a sample is not what the processor takes.
            MissingExtraError: the processor needs Pillow or torchvision.
            OutputError: the disk is full.
        """
        windows = iter(self._next, None)
        found = _in_file(islice(windows, count))
        if self.left_out:
            logger.warning(
                "%d samples were left out, whose images need up to %d tokens: more than a window "
                "has (--seqlen %d)",
                self.left_out,
                self.needed,
                self.seqlen,
            )
        return found

    def _next(self) -> ImageWindow | None:
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
        filled = self._filled(made)
        return None if filled is None else filled.cut(self.seqlen)

    def _made(self, chosen: Sequence[_Piece]) -> _Inputs:
        text = "".join(piece.text for piece in chosen)
        images = [image for piece in chosen for image in piece.sample.images]
        made = _inputs(text, images, chosen[0].sample.where, self.processor)
        begin = list(self.begins_with)
        # Templates and processors write it themselves, at a place of their own.
        if begin and begin[0] not in made.tokens_R[: chosen[0].length].tolist():
            made = _only_text(begin).followed_by(made)
        return made

    def _filled(self, made: _Inputs) -> _Inputs | None:
        """Return inputs of a whole window or more; None if there is no text left for that."""
        next_sample = 0
        while len(made.tokens_R) < self.seqlen:
            piece = self._piece(next_sample)
            if piece is None:
                return None
            plain = _rendered(piece.sample, self.processor, with_images=False)
            ids = self.processor.tokenizer(plain, add_special_tokens=False)["input_ids"]
            made = made.followed_by(_only_text(ids))
            next_sample += 1
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
                self.left_out, self.needed = self.left_out + 1, max(self.needed, needed)
            else:
                self._waiting.append(_Piece(sample, text, len(made.tokens_R), made.images_end))
        return self._waiting[position]


def _in_file(windows: Iterator[ImageWindow]) -> list[ImageWindow]:
    """Return windows whose images are in a temporary file without a name, which goes with them.

    Pixels take more memory than anything else of a text, and each window's are looked at seldom.

    Raises:
        OutputError: the disk is full.
    """
    written: list[tuple[Tensor, dict[str, tuple[int, Tensor]]]] = []
    try:
        with tempfile.TemporaryFile() as file:
            for window in windows:
                places = {}
                for name, value in window.images.items():
                    file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
                    # Its shape and dtype alone.
                    places[name] = file.tell(), value.to("meta")
                    file.write(value.contiguous().numpy().tobytes())
                written.append((window.tokens_T, places))
            file.flush()
            if not file.tell():
                return [ImageWindow(tokens_T, {}) for tokens_T, _ in written]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise OutputError(
            f"cannot make room for the images of the windows in {tempfile.gettempdir()} "
            f"({error.strerror or error}); free the disk, set TMPDIR, or take fewer --samples"
        ) from error

    def read(offset: int, like: Tensor) -> Tensor:
        flat = torch.frombuffer(mapped, dtype=like.dtype, count=like.numel(), offset=offset)
        return flat.view(like.shape)

    return [
        ImageWindow(tokens_T, {name: read(*place) for name, place in places.items()})
        for tokens_T, places in written
    ]


@dataclass(frozen=True)
class _Piece:
    """A sample as text, and how many tokens it has: in all, and up to the end of its images."""

    sample: Sample
    text: str
    length: int
    images_end: int


@dataclass(frozen=True)
class _Inputs:
    """What a processor made of samples.

    Attributes:
        tokens_R: token ids.
        by_token: values of every token, [1, R], such as its type.
        images: values of the images.
        images_end: tokens up to the end of the last image.
    """

    tokens_R: Tensor
    by_token: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    images_end: int

    def followed_by(self, other: _Inputs) -> _Inputs:
        """Return the inputs of two texts, of which at most one has images."""
        by_token = {}
        for name in {**self.by_token, **other.by_token}:
            # Text is of type 0 where tokens have types.
            parts = [
                each.by_token.get(name, torch.zeros(1, len(each.tokens_R), dtype=torch.int64))
                for each in (self, other)
            ]
            by_token[name] = torch.cat(parts, dim=1)
        end = len(self.tokens_R) + other.images_end if other.images_end else self.images_end
        return _Inputs(
            torch.cat([self.tokens_R, other.tokens_R]),
            by_token,
            {**self.images, **other.images},
            end,
        )

    def cut(self, seqlen: int) -> ImageWindow:
        """Return a window of the first tokens."""
        by_token = {name: value[:, :seqlen] for name, value in self.by_token.items()}
        images = {**by_token, **self.images} if self.images_end else {}
        return ImageWindow(self.tokens_R[:seqlen], images)


def _only_text(ids: Sequence[int]) -> _Inputs:
    return _Inputs(torch.tensor(ids, dtype=torch.int64), {}, {}, 0)


def _inputs(text: str, images: Sequence[Any], where: str, processor: Any) -> _Inputs:
    """Return what a processor makes of a text with places for images.

    Raises:
        TextError: the processor refuses it.
        MissingExtraError: it needs Pillow or torchvision.
    """
    pictures = [open_image(image, where) for image in images]
    try:
        if not images:
            ids = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return _only_text(ids)
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
            f"{where}: the model's processor ({type(processor).__name__}) does not take this text "
            f"with {len(images)} images: {str(error).splitlines()[0][:200]}"
        ) from error
    tokens_R = made["input_ids"][0]
    by_token = {name: v for name, v in others.items() if v.shape == made["input_ids"].shape}
    of_images = torch.isin(tokens_R, torch.tensor(_image_tokens(processor)))
    if not bool(of_images.any()):
        raise TextError(
            f"{where}: the model's processor ({type(processor).__name__}) put no tokens of an "
            "image into the text; give text alone"
        )
    return _Inputs(
        tokens_R,
        by_token,
        {name: value for name, value in others.items() if name not in by_token},
        int(of_images.nonzero()[-1]) + 1,
    )


def _image_tokens(processor: Any) -> list[int]:
    """Return the ids of tokens that stand for a part of an image."""
    found = [*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)]
    found.append(getattr(processor.tokenizer, "image_token_id", None))
    return [token for token in found if isinstance(token, int)]


def _rendered(sample: Sample, processor: Any, *, with_images: bool = True) -> str:
    """Return a sample as text, with the processor's own places for images.

    Raises:
        TextError: there is no chat template, or the sample does not fit it, or a text has places
            for another number of images.
    """
    if isinstance(sample.content, str):
        return _text_with_places(sample, processor, with_images=with_images)
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise TextError(
            f"the model's processor has no chat template, which {CHAT_COLUMN!r} need; give text "
            "beside the images, or an instruct model"
        )
    messages = [
        {
            **message,
            "content": [p for p in message["content"] if with_images or p["type"] == "text"],
        }
        for message in sample.content
    ]
    try:
        text: str = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise TextError(f"{sample.where}: does not fit the chat template: {error}") from error
    return text


def _text_with_places(sample: Sample, processor: Any, *, with_images: bool) -> str:
    assert isinstance(sample.content, str)
    token = getattr(processor, "image_token", None)
    places = sample.content.count(token) if token else 0
    if not with_images:
        return sample.content.replace(token, "") if token else sample.content
    if places not in (0, len(sample.images)):
        raise TextError(
            f"{sample.where}: the text has {places} places for images ({token}), the column has "
            f"{len(sample.images)} images; there must be one for each"
        )
    if places or not sample.images:
        return sample.content
    return _place(processor) * len(sample.images) + sample.content


def _place(processor: Any) -> str:
    """Return what stands for an image in a text: what the chat template writes, else its token."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template:
        # Up to a text behind it, with and without the image.
        with_image, without = (
            str(
                processor.apply_chat_template(
                    [{"role": "user", "content": [*image, {"type": "text", "text": "~"}]}],
                    chat_template=template,
                    tokenize=False,
                )
            ).partition("~")[0]
            for image in ([{"type": "image"}], [])
        )
        if with_image != without:
            same = (a == b for a, b in zip(with_image, without, strict=False))
            return with_image[sum(takewhile(bool, same)) :]
    return str(getattr(processor, "image_token", ""))


def shuffled(
    samples: Iterator[Sample], generator: torch.Generator, together: int
) -> Iterator[Sample]:
    """Yield samples in another order, so many at a time: images are too large to hold them all."""
    while chunk := [sample for _, sample in zip(range(together), samples, strict=False)]:
        for position in torch.randperm(len(chunk), generator=generator).tolist():
            yield chunk[position]
