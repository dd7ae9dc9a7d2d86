"""With nothing installed but the core dependencies, cfsp imports, prunes a directory and loads.

A process sees only links to the distributions that the core needs, found from what is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cfsp.planning.plan_file import PruningPlan
from conftest import REPOSITORY

EXTRAS = ("datasets", "pyarrow", "gguf", "peft", "lm_eval", "openvino", "llama_cpp_py_sync", "PIL")

PROGRAM = f"""
import importlib.util
import sys

found = [name for name in {EXTRAS} if importlib.util.find_spec(name)]
assert not found, found

import cfsp
from cfsp.cli import main

model, text, out = sys.argv[1:]
argv = ["prune", model, "--sparsity", "0.4", "--multiple", "4", "--data", text, "--samples", "4",
        "--seqlen", "32", "--eval", text, "--eval-windows", "1", "--out", out]
assert main(argv) == 0
assert main(["inspect", out]) == 0
assert main(["verify", out]) == 0
print(sum(parameter.numel() for parameter in cfsp.load(out).parameters()))
"""


def needed_by(name: str) -> Iterator[Distribution]:
    """Give a distribution without its extras, and all that it needs."""
    waiting, seen = [name], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        yield found
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)


def link_distributions(name: str, directory: Path) -> None:
    for found in needed_by(name):
        tops = {file.parts[0] for file in found.files or () if not file.is_absolute()}
        for top in tops - {"..", "__pycache__"}:
            link = directory / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))


def test_the_core_alone_prunes_and_loads(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    link_distributions("cfsp-llm", packages)
    ended = subprocess.run(
        # -S: no site-packages but ours.
        [sys.executable, "-S", "-c", PROGRAM, tiny_checkpoint("llama"), text_file, out],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) > 0
    assert PruningPlan.load(out / "cfsp_plan.json").ffn_sparsity > 0.35
