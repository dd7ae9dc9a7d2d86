"""Symbolic links in a model directory: what is read or travels on must lie in it.

Weights and tokenizer are read, some files are copied into the pruned model, and people publish
that. A link in a downloaded archive could so carry any file of the machine out of it. The
cache of the hub is made of links: those lead from a snapshot to the blobs of the same repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cfsp.errors import CheckpointError

# Where a tokenizer or processor with several chat templates has all but one: the only folder of a
# model directory that is read.
TEMPLATES = "additional_chat_templates"

_BLOBS, _REPOSITORY = "blobs", "models--"


def check_links(directory: Path, folders: Iterable[str] | None = (TEMPLATES,)) -> None:
    """Check that no file in a model directory is one from elsewhere, but from the hub's cache.

    Of the folders in it those that are named are read as well, None for all that are not hidden.
    """
    home = directory.resolve()
    for place, names, files in os.walk(directory):
        if folders is not None and Path(place) == directory:
            names[:] = [name for name in names if name in folders]
        names[:] = sorted(name for name in names if not name.startswith("."))
        for path in (Path(place, name) for name in (*names, *sorted(files))):
            if path.is_symlink() and (path.is_dir() or not _is_within(path, home)):
                found = "folder" if path.is_dir() else "file outside the directory"
                raise CheckpointError(
                    f"{path} is a link to a {found}, {path.readlink()}; put the "
                    f"{found.split()[0]} itself there, or name the directory that it lies in"
                )


def _is_within(link: Path, home: Path) -> bool:
    """Return whether a link leads to a file in a directory, or in its repository in the cache."""
    target = Path(os.path.realpath(link))  # of a circle of links as well
    blobs = target.parent
    is_blob = blobs.name == _BLOBS and blobs.parent.name.startswith(_REPOSITORY)
    return target.is_relative_to(home) or (is_blob and home.is_relative_to(blobs.parent))
