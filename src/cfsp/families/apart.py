"""A function in a process of its own: what it is about may crash, or never end."""

from __future__ import annotations

import math
import os
import signal
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
_SHARE_OF_WAITING = 10
# Two threads must not look after one process.
_LOCK = Lock()


class NoAnswerError(Exception):
    """The process ended without an answer, or had none in time."""


def call_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Call a function of a module in a process with one thread; return what it returns.

    Args:
        function: what it returns must survive pickling.
        *arguments: likewise.
        seconds: it is stopped after computing so long, or after ten times as long in all: on a busy
            machine it is slow through no fault of its own.

    Raises:
        NoAnswerError: it crashed, or was stopped.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send, args=(function, arguments, seconds, sender), daemon=True
    )
    with _LOCK:
        process.start()
    sender.close()
    answered, late = False, f"no verdict after {seconds:.0f} seconds"
    try:
        if not receiver.poll(_SHARE_OF_WAITING * seconds):
            raise NoAnswerError(late)
        answer = receiver.recv()
        answered = True
        return answer
    except EOFError:
        with _LOCK:
            process.join()
        if process.exitcode == -signal.SIGXCPU:
            raise NoAnswerError(late) from None
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


def _send(
    function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, sender: Connection
) -> None:
    import torch
    import transformers

    _stop_after(seconds)
    # What classes and libraries say on the way is not about the user's work.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(function(*arguments))


def _stop_after(seconds: float) -> None:
    """Let the system stop this process after computing so long, where it can."""
    try:
        import resource
    except ImportError:  # not everywhere: the time in all is limited as well
        return
    _, hardest = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), hardest))
