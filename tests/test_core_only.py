"""With nothing installed but its wheel and the core dependencies, cfsp prunes and loads.

The environment has links to the distributions that the core needs, found from what is installed.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cfsp.planning.plan_file import PruningPlan
from conftest import REPOSITORY

EXTRAS = ("datasets", "pyarrow", "gguf", "lm_eval", "openvino", "llama_cpp_py_sync")

PROGRAM = f"""
import importlib.util
import sys

found = [name for name in {EXTRAS} if importlib.util.find_spec(name)]
assert not found, found

import cfsp
from cfsp.cli import main

model, text, out = sys.argv[1:]
argv = ["prune", model, "--sparsity", "0.4", "--multiple", "4", "--data", text, "--samples", "4",
        "--seqlen", "32", "--eval", text, "--windows", "1", "--out", out]
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


def run(*command: object) -> str:
    """Return what a command prints; it sees no PYTHONPATH of ours."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    ended = subprocess.run(words, env=clean, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with what the core needs, and with the wheel where one can be built."""
    place = tmp_path_factory.mktemp("core")
    environment, packages = place / "env", place / "packages"
    venv.create(environment, with_pip=False)
    packages.mkdir()
    link_distributions("cfsp-llm", packages)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    seen = [packages]
    if find_spec("hatchling"):
        build = (sys.executable, "-m", "hatchling", "build", "--target", "wheel")
        run(*build, "--directory", place)
        (wheel,) = place.glob("cfsp_llm-*.whl")
        pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python")
        run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    else:
        seen.append(REPOSITORY / "src")
    (site_packages / "core.pth").write_text("".join(f"{path}\n" for path in seen))
    return environment


def test_the_core_alone_prunes_and_loads(environment, tiny_checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    python = environment / "bin/python"
    printed = run(python, "-c", PROGRAM, tiny_checkpoint("llama"), text_file, out)
    assert int(printed.split()[-1]) > 0
    assert PruningPlan.load(out / "cfsp_plan.json").ffn_sparsity > 0.35
    assert (out / "modeling_cfsp.py").is_file()  # from a template that lies in the wheel


def test_the_wheel_prunes_from_an_environment_of_its_own(environment):
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install '.[dev]'")
    assert "prune" in run(environment / "bin/cfsp", "--help")
    (installed,) = environment.glob("lib/python*/site-packages/cfsp")
    source = REPOSITORY / "src/cfsp"
    paths = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in (path for path in paths if "__pycache__" not in path.parts):
        assert (installed / path).read_bytes() == (source / path).read_bytes(), path
