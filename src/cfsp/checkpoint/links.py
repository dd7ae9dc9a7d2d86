"""Symbolic links in a model directory: files of it must lie in it.

Weights and tokenizer are read, and some files are copied into the pruned model, which people
publish. A link in a downloaded archive could so carry any file of the machine into it. The
cache of the hub is made of links: those lead from a snapshot to the blobs of the same repository.
"""

from __future__ import annotations

import os
from pathlib import Path

from cfsp.errors import CheckpointError

_BLOBS, _REPOSITORY = "blobs", "models--"


def check_links(directory: Path) -> None:
    """Check that every file in a directory lies in it, or in the hub's cache.

    Links to directories are of no interest: nothing is read from those.

    Raises:
        CheckpointError: one leads elsewhere.
    """
    home = directory.resolve()
    for path in sorted(directory.iterdir()):
        if not path.is_symlink() or not path.is_file():
            continue
        if path.resolve().is_relative_to(home) or _is_blob(path):
            continue
        raise CheckpointError(
            f"{path} is a link to a file outside the directory, {path.readlink()}; put the file "
            "itself there, or name the directory that it lies in"
        )


def _is_blob(link: Path) -> bool:
    """Return whether a link leads to the blobs of a repository in the hub's cache."""
    target = Path(os.path.normpath(link.parent.resolve() / link.readlink()))
    blobs = target.parent
    return blobs.name == _BLOBS and blobs.parent.name.startswith(_REPOSITORY)
