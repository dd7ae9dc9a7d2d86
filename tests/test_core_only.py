"""With nothing installed but the core dependencies, cfsp and its wheel prune a directory and load.

A process sees only links to the distributions that the core needs, found from what is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
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


def test_the_wheel_prunes_from_an_environment_of_its_own(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install '.[dev]'")
    environment, packages, out = tmp_path / "env", tmp_path / "packages", tmp_path / "out"
    venv.create(environment, with_pip=False)
    packages.mkdir()
    link_distributions("cfsp-llm", packages)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "core.pth").write_text(f"{packages}\n")

    def run(*command: object) -> str:
        ours = command[0] == sys.executable
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ended = subprocess.run(
            [str(word) for word in command],
            env=None if ours else clean,
            cwd=REPOSITORY if ours else tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path)
    (wheel,) = tmp_path.glob("cfsp_llm-*.whl")
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    cfsp = environment / "bin/cfsp"
    assert "prune" in run(cfsp, "--help")
    small = ("--multiple", 4, "--data", text_file, "--samples", 4, "--seqlen", 32)
    run(cfsp, "prune", tiny_checkpoint("llama"), "--sparsity", 0.4, *small, "--out", out)
    assert PruningPlan.load(out / "cfsp_plan.json").ffn_sparsity > 0.35
    assert (out / "modeling_cfsp.py").is_file()  # from a template that lies in the wheel
    assert (site_packages / "cfsp/families/proved.json").is_file()
