"""The C library of llama.cpp, through the bindings of llama-cpp-py-sync.

The library calls back with its messages for as long as the process lives, so the callback is
set here, once, for all who use it: a callback that belongs to one user is freed with that user,
and the next message crashes the process.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from cfsp.errors import MissingExtraError

_messages: list[str] = []


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
