"""A function in a process of its own: what it is about may crash, or never end."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection, wait
from threading import Lock
from typing import Any

# What takes seconds to import; it is imported once for all processes.
_IMPORTED = (
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "cfsp.architecture.proof",
    "cfsp.families.trial",
)
# After the answer, to leave nothing behind.
_LAST_SECONDS = 10.0
# Two threads must not look after one process.
_LOCK = Lock()


class NoAnswerError(Exception):
    """The process ended without an answer, or had none in time."""


def call_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Call a function of a module in a process with one thread; return what it returns.

    Args:
        function: what it returns must survive pickling.
        *arguments: likewise.
        seconds: it is stopped after these.

    Raises:
        NoAnswerError: it crashed, or was stopped.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, arguments, sender), daemon=True)
    with _LOCK:
        process.start()
    sender.close()
    answered = False
    try:
        if not receiver.poll(seconds):
            raise NoAnswerError(f"no verdict after {seconds:.0f} seconds")
        answer = receiver.recv()
        answered = True
        return answer
    except EOFError:
        with _LOCK:
            process.join()
        raise NoAnswerError(f"its process ended with status {process.exitcode}") from None
    finally:
        receiver.close()
        if answered:
            wait([process.sentinel], _LAST_SECONDS)
        with _LOCK:
            process.kill()
            process.join()


def stop_calls() -> None:
    """Stop all processes that still compute; who waits for one is told so."""
    with _LOCK:
        for process in active_children():
            process.kill()


def _send(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection) -> None:
    import torch
    import transformers

    # What classes and libraries say on the way is not about the user's work.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(function(*arguments))
