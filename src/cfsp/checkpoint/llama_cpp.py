"""llama.cpp itself, through the bindings of llama-cpp-py-sync: read, compute, quantise, tokens.

Its C interface is called directly, because the package's own class gives no logits of chosen
tokens. The library calls back with its messages for as long as the process lives, so the callback
is set here, once: one that belongs to a user is freed with that user, and the next message crashes
the process. On a damaged vocabulary it ends the process that it is in, so tokens come from one of
their own, which imports no torch.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cfsp.errors import ExportError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_F32 = 0  # ggml_type
_messages: list[str] = []
_callbacks: list[Any] = []  # kept alive: the library calls back

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


@cache
def llama_cpp_library() -> tuple[Any, Any]:
    """Return (ffi, library), started once, with messages kept instead of printed."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        raise MissingExtraError("running llama.cpp", "llamacpp") from error
    ffi, lib = get_ffi(), get_lib()

    def keep(level: int, text: Any, data: Any) -> None:
        _messages.append(ffi.string(text).decode(errors="replace"))
        del _messages[:-200]

    _callbacks.append(ffi.callback("void(enum ggml_log_level, const char *, void *)", keep))
    lib.llama_log_set(_callbacks[0], ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


def last_error() -> str:
    """Return the first line of the kept messages that tells of an error."""
    lines = "".join(_messages).splitlines()
    errors = [line for line in lines if "error" in line or "fail" in line or "missing" in line]
    return (errors or lines or ["no reason given"])[0].strip()


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


class LlamaCpp:
    """A .gguf file, loaded; a context manager, because its memory belongs to the library.

    `context` tokens of one sequence fit, prompt and what follows. It is `exact`, or as fast as
    llama.cpp is by default.
    """

    def __init__(
        self, path: Path, context: int = 512, threads: int | None = None, *, exact: bool = True
    ) -> None:
        import torch

        self._ffi, self._lib = llama_cpp_library()
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._context, self._past = self._ffi.NULL, 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), settings)
        if self._model == self._ffi.NULL:
            raise ExportError(f"{llama_cpp_version()} cannot load {path.name}: {last_error()}")
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(vocabulary)
        asked = self._lib.llama_context_default_params()
        asked.n_ctx = asked.n_batch = context
        asked.n_threads = asked.n_threads_batch = threads or torch.get_num_threads()
        if exact:
            asked.n_ubatch, asked.flash_attn_type = context, 0
            asked.type_k = asked.type_v = _F32
        self._context = self._lib.llama_init_from_model(self._model, asked)
        if self._context == self._ffi.NULL:
            self.__exit__()
            raise ExportError(
                f"{llama_cpp_version()} cannot run {path.name} with {context} tokens: "
                f"{last_error()}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first ones."""
        memory = self._lib.llama_get_memory(self._context)
        removed = self._lib.llama_memory_seq_rm(memory, 0, length, -1)
        assert removed, "a cache of keys and values can be cut anywhere"
        self._past = length

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Read more tokens of the sequence; return logits_TV after the last ones, or all."""
        import torch

        length, last = len(tokens), len(tokens) if last is None else last
        batch = self._lib.llama_batch_init(length, 0, 1)
        try:
            batch.n_tokens = length
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self._past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i >= length - last
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status != 0:
            raise ExportError(f"{llama_cpp_version()} failed with status {status}")
        self._past += length
        size = 4 * last * self.vocabulary
        data = self._ffi.buffer(self._lib.llama_get_logits(self._context), size)
        logits_TV = np.frombuffer(data, dtype=np.float32).reshape(last, self.vocabulary)
        return torch.from_numpy(logits_TV.copy())  # the memory is the library's


def quantise(source: Path, target: Path, file_type: int) -> None:
    """Write a quantised copy of a .gguf file; its type is a number of the enum llama_ftype."""
    ffi, lib = llama_cpp_library()
    settings = ffi.new("llama_model_quantize_params *")
    settings[0] = lib.llama_model_quantize_default_params()
    settings.ftype = file_type
    status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if status != 0:
        raise ExportError(f"{llama_cpp_version()} cannot quantise the model: {last_error()}")


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
