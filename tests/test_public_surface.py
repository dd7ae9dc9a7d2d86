"""What users may rely on: the names of `cfsp`, and a README that knows every module."""

import inspect
import re
import tomllib

import pytest

import cfsp
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "cfsp"

PUBLIC = [
    "CfspError", "MaxLossIncrease", "PruneReport", "PruningPlan", "Statistics", "TargetKVCache",
    "TargetParameters", "TargetSpeedup", "Text", "__version__", "bench", "calibrate", "evaluate",
    "export", "load", "plan", "prune", "recover",
]  # fmt: skip


def test_public_names():
    assert sorted(cfsp.__all__) == sorted(PUBLIC)
    assert sorted(cfsp.__all__) == sorted(dir(cfsp))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_names_exist_and_are_documented(name):
    value = getattr(cfsp, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_names_that_are_not_there_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _ = cfsp.shrink


def test_version_is_that_of_the_distribution():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert cfsp.__version__ == project["version"]


def test_import_touches_no_global_flag_of_torch(forks):
    code = (
        "import sys, torch\n"
        "assert 'cfsp' not in sys.modules\n"
        "def flags():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.are_deterministic_algorithms_enabled(),\n"
        "            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())\n"
        "before = flags()\n"
        "import cfsp\n"
        "for name in cfsp.__all__: getattr(cfsp, name)\n"
        "assert flags() == before, (before, flags())\n"
    )
    forks.code(code)


# The README's map.


def named() -> set[str]:
    """Return the files and folders that the README's section on changing the code names."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^## I want to change\b.*?(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert match, "README.md has no section '## I want to change'"
    rows = [line for line in match[0].splitlines() if line.startswith("|")]
    return set(re.findall(r"`([\w./-]+(?:\.py|/))`", "\n".join(rows)))


def test_readme_names_every_package_and_top_module():
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(packages) > 10
    first_folders = {f"{name.split('/')[0]}/" for name in named() if "/" in name}
    assert packages <= first_folders
    assert modules <= named()


def test_readmes_map_names_nothing_that_is_gone():
    for path in named():
        assert (PACKAGE / path).exists() or (REPOSITORY / path).exists(), path
