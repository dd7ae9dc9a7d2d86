"""Proof of model types, each in a process of its own: a class may crash or hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from cfsp.architecture.experts import with_experts
from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import check_is_decoder
from cfsp.architecture.proof import prove, small_run_of
from cfsp.errors import CfspError, UnsupportedModelError, first_line
from cfsp.families.apart import NoAnswerError, call_apart, stop_calls
from cfsp.families.catalogue import Family, Reasons
from cfsp.settings import PARTS, Part
from cfsp.streaming.block_proof import prove_without_attentions, prove_without_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Seconds. For a few types all proofs take more than two minutes on a slow core.
PROOF_LIMIT = 300.0
MOST_AT_A_TIME = 4


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
        found["experts"] = _tried(_experts_go, ffns, config, model_class)
    return {part: reason if isinstance(reason, str) else None for part, reason in found.items()}


def _tried(proof: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a proof returns, or in words why it failed."""
    try:
        return proof(*arguments)
    except CfspError as refusal:
        return str(refusal)
    except Exception as error:  # a bug of ours, or of the class
        return f"the proof did not end ({first_line(error)})"


def _one_goes(blocks: Sequence[int], proof: Callable[[Sequence[int]], None]) -> None:
    """Prove that one of some blocks can go: that in the middle, the last, or one of the first.

    Args:
        blocks: ascending.
        proof: of those that go.

    Raises:
        UnsupportedModelError: none of these can; why the first one can't.
    """
    first: UnsupportedModelError | None = None
    for block in dict.fromkeys((blocks[len(blocks) // 2], blocks[-1], *blocks[:2])):
        try:
            proof([block])
            return
        except UnsupportedModelError as refusal:
            first = first or refusal
    assert first is not None
    raise first


def _experts_go(
    architecture: Architecture, config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> None:
    with_experts(architecture, config, small_run_of(config, model_class))
