"""Names of models and texts as people read them, and what others may read of them.

What is published, that is the model card, the page and the manifest's command, has no path of the
machine in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TypeGuard

from cfsp.checkpoint.locating import exists


def is_hub_id(name: object) -> TypeGuard[str]:
    """Whether a name is OWNER/NAME, or OWNER/NAME@REVISION, and no path on this machine."""
    shape = r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?"
    if not isinstance(name, str) or re.fullmatch(shape, name) is None:
        return False
    return not exists(Path(name))


def short_names(names: Iterable[str], least: int = 2) -> dict[str, str]:
    """Return what to call models or texts: of paths the last parts, as many as tell them apart."""
    names = list(dict.fromkeys(names))
    longest = max((len(PurePath(name).parts) for name in names), default=0)
    for parts in range(least, longest + 1):
        short = [_last_parts(name, parts) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def public_name(name: str) -> str:
    """Return what others may read of a model's or text's name: of a path its last part."""
    return _last_parts(name, 1)


def public_command(command: str) -> str:
    """Return a command with the public name of every path in it; that of --out is always one."""
    plain = re.sub(r"(--out[ =])[^\s']*/", r"\1", " ".join(command.split()))
    return re.sub(r"'([^']+)'|[^\s'\"=()]+", _public_word, plain)


def _public_word(word: re.Match[str]) -> str:
    quoted = word.group(1)
    return public_name(word.group()) if quoted is None else f"'{public_name(quoted)}'"


def _last_parts(name: str, parts: int) -> str:
    if is_hub_id(name.partition(":")[0]):  # names of texts that come with cfsp look like one
        return name
    return "/".join(PurePath(name).parts[-parts:]) or name
