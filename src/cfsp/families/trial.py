"""Proof of model types, each in a process of its own: a class may crash or hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection, wait
from threading import Lock
from typing import Any

from cfsp.architecture.expert_proof import with_experts
from cfsp.architecture.model_classes import check_is_decoder
from cfsp.architecture.proof import prove, small_run_of
from cfsp.errors import CfspError, UnsupportedModelError, first_line
from cfsp.families.catalogue import Family, Reasons
from cfsp.settings import PARTS, Part
from cfsp.streaming.block_proof import prove_without_attentions, prove_without_blocks

# Seconds. For a few types all proofs take more than two minutes on a slow core of its own.
PROOF_LIMIT = 1800.0
MOST_AT_A_TIME = 4
# What takes seconds to import; it is imported once for all processes.
_IMPORTED = (
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "cfsp.families.trial",
)
# After the answer, to leave nothing behind.
_LAST_SECONDS = 10.0
# Two threads must not look after one process.
_LOCK = Lock()


def verdicts(families: Sequence[Family]) -> Iterator[Reasons]:
    """Yield what `why_not` says of each family, in order; several are worked on at a time."""
    executor = ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1))
    try:
        yield from executor.map(why_not, families)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        stop_calls()


def why_not(family: Family) -> Reasons:
    """Prove a family with a config of its type; return for each part why none can go, if so."""
    try:
        reasons: Reasons = call_apart(_why_not, family, seconds=PROOF_LIMIT)
    except NoAnswerError as error:
        return dict.fromkeys(PARTS, str(error))
    return reasons


def _why_not(family: Family) -> Reasons:
    try:
        model_class, config = family.class_and_config()
        check_is_decoder(config)
    except CfspError as refusal:
        return dict.fromkeys(PARTS, str(refusal))
    except Exception as error:  # anything may be wrong with a default config
        return dict.fromkeys(PARTS, f"no config could be made ({first_line(error)})")
    ffns = _tried(prove, config, model_class)
    attentions = _tried(prove, config, model_class, ("attention",))
    found: dict[Part, object] = dict.fromkeys(PARTS, ffns)
    found["kv"] = found["attention"] = attentions
    # An attention that goes whole was first tried with fewer KV groups.
    if isinstance(attentions, str) or all(unit.is_whole for unit in attentions.of_part("kv").units):
        found["kv"] = _tried(prove, config, model_class, ("kv",))
    if not isinstance(attentions, str):
        blocks = [unit.block for unit in attentions.of_part("kv").units]
        proof = partial(prove_without_attentions, config, attentions)
        found["attention"] = _tried(_one_goes, blocks, proof)
    if not isinstance(ffns, str):
        blocks = list(range(ffns.block_count))
        found["blocks"] = _tried(_one_goes, blocks, partial(prove_without_blocks, config))
        run = partial(small_run_of, config, model_class)
        found["experts"] = _tried(lambda: with_experts(ffns, config, run()))
    return {part: reason if isinstance(reason, str) else None for part, reason in found.items()}


def _tried(proof: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return proof(*arguments)
    except CfspError as refusal:
        return str(refusal)
    except Exception as error:  # a bug of ours, or of the class
        return f"the proof did not end ({first_line(error)})"


def _one_goes(blocks: Sequence[int], proof: Callable[[Sequence[int]], None]) -> None:
    """Prove that one of some blocks can go: that in the middle, the last, or one of the first."""
    first: UnsupportedModelError | None = None
    for block in dict.fromkeys((blocks[len(blocks) // 2], blocks[-1], *blocks[:2])):
        try:
            proof([block])
            return
        except UnsupportedModelError as refusal:
            first = first or refusal
    assert first is not None
    raise first


class NoAnswerError(Exception):
    """The process ended without an answer, or had none in time."""


def call_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Call a function of a module in a process with one thread; return what it returns.

    Arguments and answer must survive pickling. Where it crashes, or has no answer in time, it is a
    `NoAnswerError`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, arguments, sender), daemon=True)
    with _LOCK:
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise NoAnswerError(f"no verdict after {seconds:.0f} seconds")
        answer = receiver.recv()
        wait([process.sentinel], _LAST_SECONDS)
        return answer
    except EOFError:
        with _LOCK:
            process.join()
        raise NoAnswerError(f"its process ended with status {process.exitcode}") from None
    finally:
        receiver.close()
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
