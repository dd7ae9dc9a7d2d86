"""What users may rely on: the names of `cfsp`, and a README that knows every module."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import cfsp
from conftest import REPOSITORY
from forks import Forks, Job

PACKAGE = REPOSITORY / "src" / "cfsp"

PUBLIC = [
    "CfspError",
    "MaxLossIncrease",
    "PruneReport",
    "PruningPlan",
    "Statistics",
    "TargetParameters",
    "TargetSpeedup",
    "Text",
    "__version__",
    "calibrate",
    "evaluate",
    "load",
    "plan",
    "prune",
]


def test_public_names() -> None:
    assert sorted(cfsp.__all__) == sorted(PUBLIC)
    assert sorted(cfsp.__all__) == sorted(dir(cfsp))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(cfsp, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _ = cfsp.shrink


def test_version_is_that_of_the_distribution() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert cfsp.__version__ == project["version"]


def test_import_is_light() -> None:
    code = (
        "import sys, cfsp\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_touches_no_global_flag_of_torch(forks: Forks) -> None:
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
    (done,) = forks(Job("forks.run_code", {"code": code}))
    assert done.status == 0, done.stderr


# The README's map of the modules.


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )


def module_map() -> set[str]:
    """Return the backticked paths of the README's section on changing the code."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^## I want to change\b.*?(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert match, "README.md has no section '## I want to change'"
    return set(re.findall(r"`([\w./-]+(?:\.py|/))`", match[0]))


def test_readme_names_every_module() -> None:
    named = module_map()
    assert len(modules()) > 40
    folders = tuple(path for path in named if path.endswith("/"))
    missing = [name for name in modules() if name not in named and not name.startswith(folders)]
    assert not missing, f"README.md's module map does not name: {', '.join(missing)}"


def test_readme_names_no_module_that_is_gone() -> None:
    for path in module_map():
        assert (PACKAGE / path).exists() or (REPOSITORY / path).exists(), path
