"""The file that `cfsp eval --out` writes: everything measured, with what was asked for."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OF_DAMAGE, OutputError, ReportError, damage_as, why_unread
from cfsp.processes import Team
from cfsp.streaming.work_dir import WorkDir, output_work_dir, remove_finished_work

logger = logging.getLogger(__name__)

_MEASURE_AGAIN = "measure again with `cfsp eval --out FILE` (or `bench --json`)"

# Sums over each window, document or question, and over how many tokens or things each is, by name.
Measures = dict[str, tuple[list[float], list[int]]]


def measured_into(
    out: Path,
    identity: dict[str, Any],
    measure: Callable[[WorkDir], dict[str, Any]],
    memory_budget: int | None,
    team: Team,
) -> dict[str, Any]:
    """Return results from a file, which the first process writes if it is not there yet.

    The file appears when all is measured; until then what is finished is in a work directory. One
    of another identity, what results depend on as JSON types, is refused.
    """
    there = team.from_first(lambda: _read_again(out, identity))
    if there is not None:
        return there
    with output_work_dir(out, identity, memory_budget, team) as work_dir:
        found = {"identity": identity, **measure(work_dir)}
        team.from_first(lambda: write_atomically(out, (json.dumps(found) + "\n").encode()))
    return found


def _read_again(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a file of earlier results has; None if it is not there."""
    if not out.exists():
        return None
    if out.is_dir():
        raise OutputError(f"{out} is a directory; choose a file for --out")
    remove_finished_work(out)
    try:
        found = read_results(out)
        before = dict(found["identity"])
    except (ReportError, *OF_DAMAGE):
        found, before = {}, {}
    now = json.loads(json.dumps(identity))
    # Measured is measured, whatever versions there are now.
    others = [key for key in now if key != "version" and before.get(key) != now[key]]
    if others:
        which = f" (other {', '.join(others)})" if before else ""
        raise OutputError(
            f"{out} exists and holds something else than was asked for now{which}; choose another "
            "--out, or remove it"
        )
    logger.info("%s is there already; nothing is measured again", out)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Read what `cfsp eval --out` wrote, or `--json` printed."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(
            f"cannot read {path}: {why_unread(error)}; make it with: cfsp eval ... --out "
            f"{shlex.quote(str(path.with_suffix('.json') if path.is_dir() else path))}"
        ) from error
    results: dict[str, Any] = found if isinstance(found, dict) else {}
    models = results.get("models")
    if (
        not isinstance(models, list)
        or not models
        or not all(isinstance(each, dict) and isinstance(each.get("model"), str) for each in models)
    ):
        raise ReportError(f"{path} is not what `cfsp eval --out` writes; {_MEASURE_AGAIN}")
    return results


def refusing_damage(paths: Iterable[Path]) -> AbstractContextManager[None]:
    """Turn what is missing in results, or of another type, into one `ReportError`."""
    return damage_as(ReportError, " or ".join(map(str, paths)), _MEASURE_AGAIN)


@dataclass(frozen=True)
class MeasuredModel:
    """One model of one or more files."""

    name: str  # with its file, where two models have one name
    fingerprint: str
    file: str  # the first that it is in
    dtype: str = ""  # that it was computed in, if that is known
    against: frozenset[str] = frozenset()  # fingerprints of the dense models it was compared with
    # By text sums over each window, and `compared` with each of them, by task scores and documents,
    # and answers to questions, with whose they are `compared` with: see `evaluate_models`.
    windows: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)

    def with_more(self, other: MeasuredModel) -> MeasuredModel:
        """Add what was measured of the same model in another file; of other parts it is refused."""
        mine = self._parts()
        for place, (parts, results) in other._parts().items():
            known, gave = mine.get(place, (parts, results))
            if known != parts:
                raise ReportError(
                    f"{self.file} and {other.file} measured {self.name} on other parts of "
                    f"{place[1]}; compare one of them"
                )
            if gave != results:
                logger.warning(
                    "%s and %s differ in the results of %s on %s, of which one is compared; name "
                    "one file",
                    *(self.file, other.file, self.name, place[1]),
                )
        windows = _joined(self.windows, other.windows)
        for text in self.windows.keys() & other.windows.keys():
            compared = (each.windows[text]["compared"] for each in (self, other))
            windows[text] = windows[text] | {"compared": _joined(*compared)}
        return replace(
            self,
            against=self.against | other.against,
            windows=windows,
            tasks=_joined(self.tasks, other.tasks),
            documents=_joined(self.documents, other.documents),
            answers=self.answers or other.answers,
        )

    def _parts(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """Return of each text and task, and of answers, what was read and what it gave."""
        return {
            **{("text", text): (x["digest"], x["loss"]) for text, x in self.windows.items()},
            **{("task", task): (hashes(x), x) for task, x in self.documents.items()},
            **({("", "answers"): (self.answers["digest"], self.answers)} if self.answers else {}),
        }


def _compared(sums: dict[str, Any]) -> dict[str, Any]:
    """Return of sums over windows what there is only beside a dense model."""
    return {name: sums[name] for name in ("divergence", "agreed") if name in sums}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return both, in this order; of what both have, the first's."""
    return {**first, **second, **first}


def read_models(paths: Sequence[Path]) -> list[MeasuredModel]:
    """Read the models of several files."""
    return joined_models(each for path in paths for each in models_in(path))


def models_in(path: Path) -> list[MeasuredModel]:
    """Read the models of one file."""
    return [measured_model(str(path), model) for model in read_results(path)["models"]]


def joined_models(models: Iterable[MeasuredModel]) -> list[MeasuredModel]:
    """Return models of several files; what is in several of them is one model.

    A dense model is one under whatever name: it has that of the first file.
    """
    models = list(models)
    dense = frozenset().union(*(each.against for each in models))
    found: dict[tuple[str, str], MeasuredModel] = {}
    for each in models:
        key = (each.name, each.fingerprint)
        if key not in found and each.fingerprint in dense:
            # Of one file it may be what was cut by nothing.
            same = (k for k, m in found.items() if k[1] == key[1] and m.file != each.file)
            key = next(same, key)
        found[key] = found[key].with_more(each) if key in found else each
    names = [name for name, _fingerprint in found]
    return [
        each if names.count(each.name) == 1 else replace(each, name=f"{each.name} ({each.file})")
        for each in found.values()
    ]


def hashes(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the documents of two models must have in common to be compared."""
    return [(document["id"], document["hash"]) for document in documents]


def documents_digest(documents: Sequence[dict[str, Any]]) -> str:
    """Return a digest of the same."""
    return sha256(str(hashes(documents)).encode()).hexdigest()[:16]


def answer_measures(answers: dict[str, Any]) -> Measures:
    """Return what is measured of answers, by name."""
    documents, tokens = answers["documents"], answers["predicted"]
    of_tokens = {name: (answers[name], tokens) for name in ("divergence", "agreed")}
    return of_tokens | {
        name: ([float(each[name]) for each in documents], [1] * len(documents))
        for name in ("stops", "loops", "alike")
    }


def measured_model(file: str, model: dict[str, Any]) -> MeasuredModel:
    """Return one model of results, of what `cfsp eval --json` says of it in a file."""
    try:
        against = model.get("agreement", {}).get("fingerprint")
        answers = dict(model.get("answers", {}))
        return MeasuredModel(
            model["model"],
            model["fingerprint"],
            file,
            str(model.get("dtype", "")),
            frozenset({against} - {None}),
            {
                text: {**sums, "compared": {against: _compared(sums)}}
                for text, sums in model["windows"].items()
            },
            dict(model.get("tasks", {})),
            dict(model.get("documents", {})),
            # The dense model is compared with itself.
            {**answers, "compared": against or model["fingerprint"]} if answers else {},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{file} has no windows or documents of {model['model']}, which pairs are compared "
            "by; measure it again with: cfsp eval ... --out FILE"
        ) from error
