"""The file that `cfsp eval --out` writes: everything measured, with what was asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import created_parents, write_atomically
from cfsp.engine.workplace import remove_finished_work
from cfsp.errors import OutputError, ReportError

logger = logging.getLogger(__name__)


def measured_into(
    out: Path, asked: dict[str, Any], measure: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return results from a file, which is written if it is not there yet.

    Args:
        out: the file; it appears when all is measured.
        asked: what the command asked for, as JSON types; the file must be of the same.
        measure: gives the results; it may keep unfinished work beside the file.

    Raises:
        OutputError: the file is there and something else was asked for, or cannot be written.
    """
    if out.exists():
        remove_finished_work(out)
        try:
            found = read_results(out)
        except ReportError:
            found = {}
        if found.get("asked") != json.loads(json.dumps(asked)):
            raise OutputError(
                f"{out} exists and holds something else than was asked for now; choose another "
                "--out, or remove it"
            )
        logger.info("%s is there already; nothing is measured again", out)
        return found
    with created_parents(out):
        found = {"asked": asked, **measure(out)}
        write_atomically(out, (json.dumps(found) + "\n").encode())
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Read what `cfsp eval --out` wrote, or `--json` printed.

    Raises:
        ReportError: it is missing, or something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"cannot read {path}: {error}; make it with: cfsp eval ... --out {path}"
        ) from error
    results: dict[str, Any] = found if isinstance(found, dict) else {}
    models = results.get("models")
    if not isinstance(models, list) or not all(
        isinstance(each, dict) and isinstance(each.get("model"), str) for each in models
    ):
        raise ReportError(f"{path} is not what `cfsp eval --out` writes")
    return results
