"""The tokenizer or processor of a model directory, and what it begins an input with.

Code that lies in the directory is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, MissingExtraError, UsageError, first_line
from cfsp.settings import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a model directory carries, or raise CheckpointError."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _loaded(
        AutoTokenizer,
        directory,
        "tokenizer ({}); copy the files of the model's own (tokenizer.json or tokenizer.model, and "
        "tokenizer_config.json) into it",
    )
    return tokenizer


def load_processor(directory: Path) -> Any:
    """Return the processor that a model directory carries, or raise CheckpointError."""
    from transformers import AutoProcessor

    unusable = (
        "processor, which images need (processor_config.json, preprocessor_config.json): {}; add "
        "the files of the original model, or give text"
    )
    processor = _loaded(AutoProcessor, directory, unusable)
    if not is_processor(processor):
        found = unusable.format(f"found only {type(processor).__name__}")
        raise CheckpointError(f"{directory} carries no usable {found}")
    return processor


def _loaded(auto_class: Any, directory: Path, unusable: str) -> Any:
    try:
        return auto_class.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers has no one exception type for this
        if isinstance(error, ImportError) and auto_class.__name__ == "AutoProcessor":
            raise MissingExtraError("reading images", "images") from error
        why = first_line(error).rstrip(" :")
        if "trust_remote_code" in str(error):  # its own words would advise to let code run
            why = "it is made by code of its own, which cfsp does not run"
        raise CheckpointError(f"{directory} carries no usable {unusable.format(why)}") from error


def is_processor(value: Any) -> bool:
    """Return whether something makes inputs of images and text, as a tokenizer does not."""
    return hasattr(value, "image_processor") and hasattr(value, "tokenizer")


def parted(given: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return the tokenizer, and the processor or None, of what a user gives as either."""
    if isinstance(given, str | Path):
        raise UsageError(
            "expected the tokenizer itself, such as AutoTokenizer.from_pretrained gives, found "
            f"{str(given)!r}"
        )
    return (given.tokenizer, given) if is_processor(given) else (given, None)


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> tuple[int, ...]:
    """Return the token ids that a window begins with: mostly BOS or none, for a few models two.

    With `auto` it is what the tokenizer itself puts before a text; `yes` is BOS even where it puts
    nothing, and `no` nothing.
    """
    if bos == "no":
        return ()
    # What a short text has before it once special tokens are added; EOS may stand after it.
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    if start or bos == "auto":
        return tuple(whole[:start])
    if not isinstance(tokenizer.bos_token_id, int):
        raise UsageError("--bos yes needs a tokenizer with a BOS token; this one has none")
    return (tokenizer.bos_token_id,)
