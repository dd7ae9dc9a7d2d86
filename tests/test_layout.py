"""The map of the source: which package may import which, and where its tests are.

A node of the graph is a package of src/cfsp, or one of the modules beside the packages. Imports
inside functions and under TYPE_CHECKING count too: they say what a reader has to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cfsp
from conftest import REPOSITORY

SOURCE = Path(cfsp.__file__).parent

# A node imports only from rows above its own; so there are no circles, and nodes of one row know
# nothing of each other.
LAYERS = (
    ("errors",),
    ("settings", "processes"),
    ("progress",),
    ("architecture",),
    ("checkpoint",),
    ("text",),
    ("streaming",),
    ("calibration",),
    ("planning",),
    ("cut",),
    ("quality",),
    ("job",),
    ("repair",),
    ("result",),
    # `bench` times what `export` writes.
    ("exports",),
    ("speed",),
    ("selection", "recovery"),
    ("decide",),
    ("pipeline", "pruning_cost"),
    ("prune_and_recover",),
    ("api", "families", "sweep"),
    ("demo",),
    # `import cfsp` gives what its modules have.
    ("__init__",),
    ("cli",),
    ("__main__",),
)

MOST_MODULES = 12


def node_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the nodes that a file imports, with the line."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{path}:{statement.lineno}: a relative import"
            assert statement.module is not None
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "cfsp":
                known = rest and (SOURCE / rest[0]).with_suffix(".py").is_file()
                known = known or (rest and (SOURCE / rest[0]).is_dir())
                yield rest[0] if known else "__init__", statement.lineno


def edges() -> dict[tuple[str, str], list[str]]:
    """Return who imports whom, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for target, line in imported(path):
            if target != (own := node_of(path)):
                place = f"{path.relative_to(SOURCE)}:{line}"
                found.setdefault((own, target), []).append(place)
    return found


def test_every_package_has_its_row() -> None:
    nodes = {node_of(path) for path in SOURCE.rglob("*.py")}
    placed = [node for row in LAYERS for node in row]
    assert sorted(placed) == sorted(nodes)


def test_imports_go_down_only() -> None:
    row_of = {node: number for number, row in enumerate(LAYERS) for node in row}
    upwards = {
        edge: places for edge, places in edges().items() if row_of[edge[1]] >= row_of[edge[0]]
    }
    assert upwards == {}


def test_few_modules_lie_beside_the_packages() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= MOST_MODULES


def test_only_the_command_line_prints() -> None:
    prints = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if node_of(path) != "cli"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("print", "tqdm.write")
    }
    assert prints == set(), "use logging.getLogger(__name__)"


def test_every_package_has_a_folder_of_tests() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    tested = {path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")}
    assert packages - tested == set()
