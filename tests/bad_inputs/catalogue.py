"""The harness of the catalogue: one row is a spoilt input, a command, and what it must answer.

A row passes if the command exits with status 2, prints nothing on standard output and one
sentence on standard error that names the thing and the cure, changes nothing that it reads, and
leaves nothing where it works: neither in the directory of the output, nor among temporary files,
nor in the cache.
"""

import hashlib
import json
import re
import shlex
import shutil
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main

TEXT = "--data {text} --samples 4 --seqlen 32"  # what gives a tiny calibration
PRUNE = "prune {model} --out {out} --sparsity 0.4 --multiple 4"
PRUNE_TEXT = f"{PRUNE} {TEXT}"
CALIBRATE = f"calibrate {{model}} --out {{out}} {TEXT}"
EVAL = "eval {model} --data {text} --windows 1 --seqlen 32"
RECOVER = "recover {pruned} --data {text} --steps 1 --seqlen 32 --out {out}"


class Place:
    """Where one case happens.

    An input, such as `place.model`, is a copy of an original that is made when it is first named.

    Attributes:
        inputs: all that a command may read; it must not change.
        work: the current directory, with the output; empty before and after.
        temporary: temporary files; likewise.
        cache: likewise.
    """

    def __init__(self, originals: Mapping[str, Path], root: Path) -> None:
        self._originals = originals
        self.inputs, self.work = root / "inputs", root / "work"
        self.temporary, self.cache = root / "aside" / "temporary", root / "aside" / "cache"
        self.out = self.work / "out"
        for directory in (self.inputs, self.work, self.temporary, self.cache):
            directory.mkdir(parents=True)

    def __getattr__(self, name: str) -> Path:
        if name.startswith("_") or name not in self._originals:
            raise AttributeError(name)
        source = self._originals[name]
        target = self.inputs / (name + source.suffix)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        setattr(self, name, target)
        return target

    def fill(self, template: str) -> str:
        """Put paths in the place of names in braces."""
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        return template.format(**{name: getattr(self, name) for name in names})


Spoil = Callable[[Place], object]


@dataclass(frozen=True)
class BadInput:
    """One row; names in braces are attributes of `Place`."""

    command: str  # what follows `cfsp`
    says: str  # of the thing, in the sentence
    cure: str  # in the sentence
    spoil: Spoil | None = None  # is done before


Table = list[BadInput]

ANNOUNCED = re.compile("parameters -> about|has little to spare|windows calibrate and repair")


def spoilt(command: str, cure: str, *rows: tuple[str, Spoil]) -> Table:
    """Return the rows of one command with one cure: what the sentence says, and what is done."""
    return [BadInput(command, says, cure, spoil) for says, spoil in rows]


def refusals(table: Table) -> Callable[..., None]:
    """Return the test of all rows of a table."""

    @pytest.mark.parametrize("case", table, ids=lambda case: f"{case.command[:40]}: {case.says}")
    def test_refused(case, place, capfd):
        assert_refused(case, place, capfd)

    return test_refused


def assert_refused(case: BadInput, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a row and check all of what it must and must not do."""
    argv = [place.fill(word) for word in shlex.split(case.command)]
    says = place.fill(case.says)
    if case.spoil is not None:
        case.spoil(place)
    before = digest_of(place.inputs)
    capfd.readouterr()
    status = exit_status(argv)
    out, err = capfd.readouterr()
    assert status == 2, (status, out, err)
    assert out == ""
    # Where only the work itself finds the fault, what it will come to is said before.
    (error,) = [line for line in err.splitlines() if not ANNOUNCED.search(line)]
    assert error.startswith(f"cfsp {argv[0]}: ") and err.endswith(f"{error}\n"), err
    assert "Traceback" not in err
    assert says in err, err
    assert place.fill(case.cure) in err, err
    assert digest_of(place.inputs) == before
    assert everything_in(place.work) == []
    assert everything_in(place.temporary) == everything_in(place.cache) == []


def exit_status(argv: list[str]) -> int:
    """Run a command in this process and return its exit status."""
    try:
        return main(argv)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def everything_in(directory: Path) -> list[str]:
    """Return the names of everything in a directory, at any depth."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def digest_of(directory: Path) -> str:
    """Return a digest over the names, kinds and contents of everything in a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)}\0".encode())
        if path.is_symlink():
            digest.update(f"link to {path.readlink()}".encode())
        elif path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# Ways to spoil a file.


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def cut(path: Path, nbytes: int) -> None:
    """Take bytes off the end of a file."""
    path.write_bytes(path.read_bytes()[:-nbytes])
