"""What lies in a model directory beside the weights: cfsp's own files, and those that travel.

None of ours may look like weights, of which loaders read every file that they find (*.safetensors,
*.bin, *.pt, *.npz): so the statistics, though stored as safetensors, have an ending of their own.

What is read or copied may be published with the pruned model, and a link in a downloaded archive
could so carry any file of the machine out of it: it must lie in the directory. The cache of the hub
is made of links from a snapshot to the blobs of the same repository.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from hashlib import file_digest
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError

CONFIG_FILE = "config.json"
MANIFEST_FILE = "cfsp.json"
PLAN_FILE = "cfsp_plan.json"
STATISTICS_FILE = "cfsp.statistics"
CARD_FILE = "README.md"
MODELING_FILE = "modeling_cfsp.py"
SWEEP_FILE = "sweep.json"  # in the directory of a sweep, beside those of its models

# What of a model goes with it wherever it goes: what is read beside its weights, and its terms.
READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
TERMS = ("*LICEN[CS]E*", "*NOTICE*", "USE_POLICY*", "COPYING*")
# Where a tokenizer or processor with several chat templates has all but one: the only folder of a
# model directory that is read.
TEMPLATES = "additional_chat_templates"
# What says how weights are quantised, beside config.json; of Mistral's, how wide the second copy of
# its weights is; and of those that a Trainer wrote, how they were trained and what they score.
_OF_THESE_WEIGHTS = {
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json",
    "trainer_state.json", "all_results.json", "eval_results.json", "train_results.json",
}  # fmt: skip
_OURS = {CONFIG_FILE, MANIFEST_FILE, PLAN_FILE, CARD_FILE}

_BLOBS, _REPOSITORY = "blobs", "models--"


def check_links(directory: Path) -> None:
    """Check that no file in a model directory is one from elsewhere, but from the hub's cache.

    Of the folders in it that of chat templates alone is read.
    """
    _check_is_readable(directory)
    home = directory.resolve()
    for place, names, files in os.walk(directory):
        if Path(place) == directory:
            names[:] = [name for name in names if name == TEMPLATES]
        names[:] = sorted(name for name in names if not name.startswith("."))
        for path in (Path(place, name) for name in (*names, *sorted(files))):
            if path.is_symlink() and (path.is_dir() or not _is_within(path, home)):
                found = "folder" if path.is_dir() else "file outside the directory"
                raise CheckpointError(
                    f"{path} is a link to a {found}, {path.readlink()}; put the "
                    f"{found.split()[0]} itself there, or name the directory that it lies in"
                )
            # Before hours of work, and not when it is copied.
            if path.is_dir() or _is_one_of((*READ, *TERMS), path):
                _check_is_readable(path)


def _check_is_readable(path: Path) -> None:
    try:
        if path.is_dir():
            os.scandir(f"{path}/.").close()  # which needs the right to enter it as well
        elif path.is_file():
            path.open("rb").close()
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {path}: permission denied; ask for it, or read a copy"
        ) from error


def _is_within(link: Path, home: Path) -> bool:
    """Return whether a link leads to a file in a directory, or in its repository in the cache."""
    target = Path(os.path.realpath(link))  # of a circle of links as well
    blobs = target.parent
    is_blob = blobs.name == _BLOBS and blobs.parent.name.startswith(_REPOSITORY)
    return target.is_relative_to(home) or (is_blob and home.is_relative_to(blobs.parent))


def copy_travelling_files(source_directory: Path, target: Path) -> None:
    """Copy tokenizer, processor, chat templates, generation config, licence and notices."""
    check_links(source_directory)  # again: hours may have passed since it was opened
    for path in sorted(source_directory.iterdir()):
        stays = path.name in _OURS | _OF_THESE_WEIGHTS or path.name.endswith(".index.json")
        if not stays and path.is_file() and _is_one_of((*READ, *TERMS), path):
            _copy_without_code(path, target / path.name)
    for path in sorted((source_directory / TEMPLATES).rglob("*")):
        if path.is_file():  # without its mode: that of a hub's cache may forbid to delete a copy
            copy = target / path.relative_to(source_directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _copy_without_code(path: Path, target: Path) -> None:
    """Copy a file; what one of a tokenizer or processor says of code that stays behind is left out.

    Whoever loads a pruned model by trust_remote_code=True would look for that code.
    """
    with suppress(ValueError, TypeError):
        if path.name.endswith("_config.json") and b'"auto_map"' in (data := path.read_bytes()):
            # A processor has the configs of its parts within its own.
            fields = json.loads(data, object_hook=_without_code)
            target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(path, target)


def _without_code(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in fields.items() if key != "auto_map"}


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
