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
    """Return the tokenizer that a model directory carries.

    Raises:
        CheckpointError: it carries none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
    except Exception as error:  # transformers has no one exception type for this
        raise CheckpointError(
            f"{directory} carries no usable tokenizer ({_why_not(error)}); copy the "
            "files of the model's own (tokenizer.json or tokenizer.model, and "
            "tokenizer_config.json) into it"
        ) from error
    return tokenizer


def load_processor(directory: Path) -> Any:
    """Return the processor that a model directory carries.

    Raises:
        CheckpointError: it carries none.
        MissingExtraError: it needs Pillow or torchvision.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    except ImportError as error:
        raise MissingExtraError("reading images", "images") from error
    except Exception as error:  # transformers has no one exception type for this
        raise CheckpointError(_no_processor(directory, _why_not(error))) from error
    if not is_processor(processor):
        raise CheckpointError(_no_processor(directory, f"found only {type(processor).__name__}"))
    return processor


def _no_processor(directory: Path, found: str) -> str:
    return (
        f"{directory} carries no usable processor, which images need (processor_config.json, "
        f"preprocessor_config.json): {found}; add the files of the original model, or give text"
    )


def _why_not(error: Exception) -> str:
    """Return why transformers reads nothing; its own words would advise to let code run."""
    if "trust_remote_code" in str(error):
        return "it is made by code of its own, which cfsp does not run"
    return first_line(error).rstrip(" :")


def is_processor(value: Any) -> bool:
    """Return whether something makes inputs of images and text, as a tokenizer does not."""
    return hasattr(value, "image_processor") and hasattr(value, "tokenizer")


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> tuple[int, ...]:
    """Return the token ids that a window begins with: mostly BOS or none, for a few models two.

    Args:
        tokenizer: the model's own.
        bos: `auto` for what the tokenizer itself puts before a text; `yes` for BOS even where it
            puts nothing; `no` for nothing.

    Raises:
        UsageError: BOS is asked for, and the tokenizer has none.
    """
    if bos == "no":
        return ()
    before = _put_before_a_text(tokenizer)
    if before or bos == "auto":
        return before
    if not isinstance(tokenizer.bos_token_id, int):
        raise UsageError("--bos yes needs a tokenizer with a BOS token; this one has none")
    return (tokenizer.bos_token_id,)


def _put_before_a_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what a short text has before it once special tokens are added (not after it: EOS)."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()
