"""Proof of model types, each in a process of its own: a class may crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
# Prints what `why_not` says of the type and the class that follow.
PROGRAM = (sys.executable, "-m", "cfsp.families.trial")


def why_not(family: Family) -> Reasons:
    """Prove a family with a config of its type; return for each part why none can go, if so."""
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


def verdicts(families: Sequence[Family]) -> Iterator[Reasons]:
    """Yield what `why_not` says of each family, in order; several are worked on at a time.

    Where its process crashes, or has no answer in time, that is the reason.
    """
    running: set[subprocess.Popen[str]] = set()

    def verdict(family: Family) -> Reasons:
        words = (*PROGRAM, family.model_type, family.class_name)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(words, **pipes, text=True) as process:
            running.add(process)
            try:
                # What classes print on the way comes before the answer.
                *_, answer = process.communicate(timeout=PROOF_LIMIT)[0].splitlines() or [""]
            except subprocess.TimeoutExpired:
                process.kill()
                return dict.fromkeys(PARTS, f"no verdict after {PROOF_LIMIT:.0f} seconds")
        if process.returncode:
            return dict.fromkeys(PARTS, f"its process ended with status {process.returncode}")
        reasons: Reasons = json.loads(answer)
        return reasons

    executor = ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1))
    try:
        yield from executor.map(verdict, families)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


if __name__ == "__main__":
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(json.dumps(why_not(Family(*sys.argv[1:]))), flush=True)
