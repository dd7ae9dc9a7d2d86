"""The tokenizer of a model directory, and what it begins an input with.

Code that lies in the directory is never run.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from cfsp.errors import OF_DAMAGE, CheckpointError, UsageError, did_you_mean, first_line
from cfsp.settings import Bos

_CURE = (
    "copy the files of the model's own (tokenizer.json or tokenizer.model, and "
    "tokenizer_config.json) into it"
)

# Where processors had the chat template before chat_template.jinja; tokenizers do not look there.
_OF_PROCESSOR = "chat_template.json"
_TEKKEN = "tekken.json"
_SHOWN_CHARACTERS = 40  # of a text that makes no tokens


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a model directory carries, or raise CheckpointError."""
    # Mistral's own package, which transformers takes where it is installed, has no template to ask.
    # What it reads splits text right, and tokenizer.json beside it often does not.
    said = {"fix_mistral_regex": True} if (directory / _TEKKEN).is_file() else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, mistral_format=False, **said
        )
    except Exception as error:  # transformers has no one exception type for this
        why, cure = first_line(error), _CURE
        if "trust_remote_code" in str(error):  # its own words would advise to let code run
            why = "it is made by code of its own, which cfsp does not run"
        elif (directory / "tokenizer.model").is_file() and not find_spec("sentencepiece"):
            why = "its tokenizer.model needs another package"  # not tiktoken, which is tried last
            cure = "pip install sentencepiece protobuf"
        raise CheckpointError(f"{directory} carries no usable tokenizer ({why}); {cure}") from error
    if not getattr(tokenizer, "chat_template", None):
        with suppress(OSError, *OF_DAMAGE):  # most have none
            fields = json.loads((directory / _OF_PROCESSOR).read_text(encoding="utf-8"))
            if isinstance(fields["chat_template"], str):
                tokenizer.chat_template = fields["chat_template"]
    return tokenizer


def check_tokenizer(given: Any) -> None:
    """Check that what a user gives is a tokenizer, and neither a path nor a processor."""
    is_processor = hasattr(given, "image_processor")
    if is_processor or not callable(given):
        found = repr(str(given)) if isinstance(given, str | Path) else type(given).__name__
        raise UsageError(
            "expected the tokenizer itself, such as AutoTokenizer.from_pretrained gives, found "
            f"{found}{did_you_mean('processor', ()) if is_processor else ''}"
        )


def encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False, **asked: Any
) -> BatchEncoding:
    """Return what a tokenizer makes of a text, which may be longer than the model can read."""
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False, **asked)
    except Exception as error:  # its own code, mostly in Rust, raises what it likes
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        raise CheckpointError(
            f"the tokenizer makes no tokens of the text {shown!r} ({first_line(error)}); give one "
            "that takes any text, as those with bytes or a token for the unknown do"
        ) from error


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> tuple[int, ...]:
    """Return the token ids that a window begins with: mostly BOS or none, for a few models two.

    With `auto` it is what the tokenizer itself puts before a text; `yes` is BOS even where it puts
    nothing, and `no` nothing.
    """
    if bos == "no":
        return ()
    # What a short text has before it once special tokens are added; EOS may stand after it.
    plain: list[int] = encoded(tokenizer, "a")["input_ids"]
    whole: list[int] = encoded(tokenizer, "a", add_special_tokens=True)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    if start or bos == "auto":
        return tuple(whole[:start])
    if not isinstance(tokenizer.bos_token_id, int):
        raise UsageError("--bos yes needs a tokenizer with a BOS token; this one has none")
    return (tokenizer.bos_token_id,)
