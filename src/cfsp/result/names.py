"""Names of models and texts as people read them, and what others may read of them.

What is published, that is the model card, the page and the manifest's command, has no path of the
machine in it.
"""

from __future__ import annotations

import re
import shlex
from ast import literal_eval
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TypeGuard

from cfsp.checkpoint.locating import exists

_QUOTED = r"'(?:[^'\\]|\\.)+'|\"(?:[^\"\\]|\\.)+\""  # a text of one line, as repr writes it


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
    """Return a command with the public name of every path in it; that of --out is always one.

    It is of a shell, as `shlex.join` writes it, or a call in Python with paths in quotes.
    """
    if not command.startswith("cfsp "):
        return re.sub(_QUOTED, lambda found: repr(public_name(literal_eval(found[0]))), command)
    try:
        words = shlex.split(command)
    except ValueError:  # somebody has changed it
        words = command.split()
    public: list[str] = []
    for before, word in pairwise(["", *words]):
        name, sign, value = "", "", word
        if before == "--set" or word.startswith("--"):
            name, sign, value = word.partition("=")
        is_out = "--out" in (name, before)
        shown = (PurePath(value).name or value) if is_out else public_name(value)
        public.append(name + sign + shown if sign else shown or name)
    return shlex.join(public)


def _last_parts(name: str, parts: int) -> str:
    if is_hub_id(name.partition(":")[0]):  # names of texts that come with cfsp look like one
        return name
    return "/".join(PurePath(name).parts[-parts:]) or name
