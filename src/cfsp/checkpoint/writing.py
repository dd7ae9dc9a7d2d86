"""Everything of a pruned checkpoint but its weights: config, code, tokenizer and the like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.checkpoint.config_file import CONFIG_FILE, read_plain_fields
from cfsp.checkpoint.links import TEMPLATES, check_links
from cfsp.checkpoint.locating import READ, TERMS
from cfsp.checkpoint.own_files import CARD_FILE, MANIFEST_FILE, MODELING_FILE, PLAN_FILE
from cfsp.checkpoint.pruned_config import pruned_fields_and_file
from cfsp.checkpoint.quantisation import QUANTISATION_FILES
from cfsp.errors import CheckpointError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import Checkpoint

_OURS = {CONFIG_FILE, MANIFEST_FILE, PLAN_FILE, CARD_FILE}


def write_config(
    source: Checkpoint,
    target: Path,
    widths: Sequence[int],
    removed: Collection[int] = (),
    experts: int | None = None,
) -> None:
    """Write config.json of the pruned model and the modelling file it needs, if any."""
    fields = read_plain_fields(source.directory)
    pruned, file = pruned_fields_and_file(
        fields, source.config, source.architecture, widths, removed, experts
    )
    (target / CONFIG_FILE).write_text(json.dumps(pruned, indent=2) + "\n", encoding="utf-8")
    if file is not None:
        (target / MODELING_FILE).write_text(file.text, encoding="utf-8")


def copy_travelling_files(source_directory: Path, target: Path) -> None:
    """Copy tokenizer, processor, chat templates, generation config, licence and notices."""
    check_links(source_directory)  # again: hours may have passed since it was opened
    for path in sorted(source_directory.iterdir()):
        travels = _is_one_of((*READ, *TERMS), path)
        if path.name in _OURS | QUANTISATION_FILES or path.name.endswith(".index.json"):
            continue
        if travels and path.is_file():
            shutil.copyfile(path, target / path.name)
    if (source_directory / TEMPLATES).is_dir():
        shutil.copytree(source_directory / TEMPLATES, target / TEMPLATES)


def digests_beside_weights(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file but weights that changes what the model says, by its path."""
    return {
        path.relative_to(directory).as_posix(): sha256_of(path)
        for path in sorted([*directory.iterdir(), *(directory / TEMPLATES).rglob("*")])
        if _is_one_of((*READ, "*.py"), path)
        and path.name not in _OURS - {CONFIG_FILE}
        and not _is_one_of(TERMS, path)
        and path.is_file()
    }


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _is_one_of(patterns: Collection[str], path: Path) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)
