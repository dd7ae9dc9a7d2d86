"""The C library of llama.cpp, through the bindings of llama-cpp-py-sync, and its tokens.

It calls back with its messages for as long as the process lives, so the callback is set here, once:
one that belongs to a user is freed with that user, and the next message crashes the process. On a
damaged vocabulary it ends the process that it is in, so tokens come from one of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_messages: list[str] = []

# Without accents that are characters of their own: llama.cpp splits them off and composes none.
_PROBES = (
    "It's 12345 o'clock -- we'll see, THEY'LL see!\r\n\n\n  def f(x):\n\treturn x**2 / 10_000  # 7",
    "naïve café, 北京2024年 한국어 日本語のテキスト и Москва 😀👍🏽   spaces   \n \n x",
    'HTTPServer getElementById {"a": [1.5e-3, null]}; <p class="b">~`$x = $y;`</p> ½ ² № ……  ',
    " a model prunes 2024 channels.\n\n## 3. The river\n- runs\n- under\t\tthe stone",
)


def has_llama_cpp() -> bool:
    """Return whether a llama.cpp is installed."""
    return find_spec("llama_cpp_py_sync") is not None


def llama_cpp_version() -> str:
    """Return the name of the installed build, like `llama.cpp b11739`."""
    from llama_cpp_py_sync import __llama_cpp_tag__

    return f"llama.cpp {__llama_cpp_tag__}"


def llama_cpp_library() -> tuple[Any, Any]:
    """Return (ffi, library), ready for use, with messages kept instead of printed."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        raise MissingExtraError("running llama.cpp", "llamacpp") from error
    ffi, lib = get_ffi(), get_lib()
    _start(ffi, lib)
    return ffi, lib


def last_error() -> str:
    """Return the first line of the kept messages that tells of an error."""
    lines = "".join(_messages).splitlines()
    errors = [line for line in lines if "error" in line or "fail" in line or "missing" in line]
    return (errors or lines or ["no reason given"])[0].strip()


@cache
def _start(ffi: Any, lib: Any) -> Any:
    """Start the library once and return the callback, which the cache keeps alive."""

    def keep(level: int, text: Any, data: Any) -> None:
        _messages.append(ffi.string(text).decode(errors="replace"))
        del _messages[:-200]

    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", keep)
    lib.llama_log_set(callback, ffi.NULL)
    lib.llama_backend_init()
    return callback


def tokens_differ(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return llama.cpp's first other token in words; "" if there is none, None if it can't tell."""
    found = llama_cpp_tokens(path, _PROBES)
    if found is None:
        return None
    for text, theirs in zip(_PROBES, found, strict=True):
        ours: list[int] = tokenizer(text)["input_ids"]
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            piece = text[:20]
            return (
                f"from token {at} of {piece!r}... on it has {theirs[at : at + 4]} instead of "
                f"{ours[at : at + 4]}"
            )
    return ""


def llama_cpp_tokens(path: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the tokens of texts, with BOS if the file wants it; None if llama.cpp cannot tell."""
    if not has_llama_cpp():
        return None
    ended = subprocess.run(
        # -P: nothing is imported from the directory that the user is in.
        [sys.executable, "-P", "-m", __name__, str(path)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        return None
    tokens: list[list[int]] = json.loads(ended.stdout)
    return tokens


def _main(path: str) -> None:
    """Read texts from standard input, and write their tokens."""
    ffi, lib = llama_cpp_library()
    settings = lib.llama_model_default_params()
    settings.vocab_only = True
    model = lib.llama_model_load_from_file(path.encode(), settings)
    if model == ffi.NULL:
        sys.exit(1)
    vocabulary = lib.llama_model_get_vocab(model)
    found = []
    for text in json.load(sys.stdin):
        data = text.encode()
        room = len(data) + 16
        tokens = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(vocabulary, data, len(data), tokens, room, True, True)
        found.append([int(tokens[i]) for i in range(count)])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1])
