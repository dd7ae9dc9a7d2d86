"""Proof and contract of model types, each in processes of its own: a class may crash or hang."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cfsp.architecture.model_classes import check_is_decoder
from cfsp.architecture.proof import prove
from cfsp.errors import CfspError
from cfsp.families.apart import NoAnswerError, call_apart, stop_calls
from cfsp.families.catalogue import Family
from cfsp.families.contract import Contract, begin_contract, judged
from cfsp.families.default_configs import default_config
from cfsp.families.stock import CHECKS, Question, ask, first_line, without_cfsp
from cfsp.settings import DEFAULT_PARTS, Part

# Seconds of a process. The slowest proof takes a tenth of that.
PROOF_LIMIT = 120.0
# The slowest part of a contract takes a tenth as well.
CONTRACT_LIMIT = 60.0
MOST_AT_A_TIME = 4


@dataclass(frozen=True)
class Verdict:
    """What came of a type.

    Attributes:
        reason: why it was not proved; None if it was.
        contract: None where it was not proved.
        groups_reason: why no attention of it can lose KV groups; None if some can.
    """

    reason: str | None
    contract: Contract | None = None
    groups_reason: str | None = None


def verdicts(families: Sequence[Family]) -> Iterator[Verdict]:
    """Yield the verdict on each family, in their order; several are worked on at a time."""
    executor = ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1))
    try:
        yield from executor.map(verdict_on, families)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        stop_calls()


def verdict_on(family: Family) -> Verdict:
    """Prove a family; if it is proved, run the contract."""
    reason = why_not(family)
    if reason is not None:
        return Verdict(reason, groups_reason=reason)
    with TemporaryDirectory(prefix="cfsp-families-") as place:
        contract = contract_of(family, Path(place))
    return Verdict(None, contract, why_not(family, ("kv",)))


def why_not(family: Family, parts: tuple[Part, ...] = DEFAULT_PARTS) -> str | None:
    """Prove parts of a family with a config of its type; return why they can't be pruned, if so."""
    try:
        reason: str | None = call_apart(_why_not, family, parts, seconds=PROOF_LIMIT)
    except NoAnswerError as error:
        return str(error)
    return reason


def contract_of(family: Family, place: Path) -> Contract:
    """Run the contract on a tiny model of a family.

    Args:
        family: that is proved.
        place: an empty directory.
    """
    begun: Contract | None
    try:
        begun = call_apart(begin_contract, family, place, seconds=CONTRACT_LIMIT)
    except NoAnswerError as error:
        begun = Contract("failed", {"pruned": str(error)})
    if begun is not None and begun.result == "not run":
        return begun
    notes = _asked(place, "pruned") if begun is None else begun.notes
    return judged(notes, lambda: _asked(place, "dense"))


def _asked(place: Path, name: str) -> dict[str, str]:
    """Ask one of the questions in a process without cfsp; return which checks failed and why.

    Nothing failed where it did not come to the question.
    """
    if not (place / f"{name}.pt").exists():
        return {}
    try:
        problems: dict[str, str] = call_apart(_ask, place, name, seconds=CONTRACT_LIMIT)
    except NoAnswerError as error:
        return dict.fromkeys(CHECKS, str(error))
    return problems


def _ask(place: Path, name: str) -> dict[str, str]:
    without_cfsp()
    work = place / f"{name}-stock"
    work.mkdir()
    return ask(Question.load(place / f"{name}.pt"), work).problems


def _why_not(family: Family, parts: tuple[Part, ...]) -> str | None:
    try:
        model_class, config = family.class_and_config(default_config)
        check_is_decoder(config)
        prove(config, model_class, parts)
    except CfspError as refusal:
        return str(refusal)
    except Exception as error:  # anything may be wrong with a default config
        return f"no config could be made ({first_line(error)})"
    return None
