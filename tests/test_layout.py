"""The map of the source: which package may import which, and where its tests are.

A node of the graph is a package of src/cfsp, or one of the modules beside the packages. Imports
inside functions and under TYPE_CHECKING count too: they say what a reader has to know.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cfsp
from cfsp.settings import PARTS
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
    ("job",),
    ("calibration",),
    ("planning",),
    ("cut",),
    ("quality",),
    ("repair",),
    ("result",),
    # `bench` times what `export` writes.
    ("exports",),
    ("speed",),
    ("selection", "recovery"),
    ("pruning_cost",),
    ("decide",),
    ("pipeline",),
    ("prune_and_recover",),
    ("api", "families", "sweep"),
    # `import cfsp` gives what its modules have.
    ("__init__",),
    ("cli",),
    ("__main__",),
)

MOST_MODULES = 12


def node_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@cache
def tree_of_files() -> dict[Path, list[ast.AST]]:
    """Return every statement and expression of every file."""
    return {
        path.relative_to(SOURCE): list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path, nodes in tree_of_files().items():
        yield from ((path, node) for node in nodes if isinstance(node, ast.Call))


def names_in(statement: ast.AST) -> list[str]:
    """Return what a statement imports, by its full name."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, f"line {statement.lineno}: a relative import"
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    return []


def imported(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield the nodes that a file imports, with the line."""
    for statement in nodes:
        for name in names_in(statement):
            package, *rest = name.split(".")
            if package == "cfsp":
                known = rest and (SOURCE / rest[0]).with_suffix(".py").is_file()
                known = known or (rest and (SOURCE / rest[0]).is_dir())
                yield rest[0] if known else "__init__", statement.lineno


def edges() -> dict[tuple[str, str], list[str]]:
    """Return who imports whom, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, nodes in tree_of_files().items():
        for target, line in imported(nodes):
            if target != (own := node_of(path)):
                found.setdefault((own, target), []).append(f"{path}:{line}")
    return found


def test_every_package_has_its_row():
    nodes = {node_of(path) for path in tree_of_files()}
    placed = [node for row in LAYERS for node in row]
    assert sorted(placed) == sorted(nodes)


def test_imports_go_down_only():
    row_of = {node: number for number, row in enumerate(LAYERS) for node in row}
    upwards = {edge: at for edge, at in edges().items() if row_of[edge[1]] >= row_of[edge[0]]}
    assert upwards == {}


def test_few_modules_lie_beside_the_packages():
    assert len(list(SOURCE.glob("*.py"))) <= MOST_MODULES


def test_no_file_is_long():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in SOURCE.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_only_the_command_line_prints():
    prints = {
        str(path)
        for path, call in calls()
        if node_of(path) != "cli" and ast.unparse(call.func) in ("print", "tqdm.write")
    }
    assert prints == set(), "use logging.getLogger(__name__)"


def test_whatever_an_auto_class_reads_runs_no_code():
    silent = []
    for path, call in calls():
        if not isinstance(call.func, ast.Attribute) or call.func.attr != "from_pretrained":
            continue
        if "auto" not in ast.unparse(call.func).lower():
            continue
        said = {key.arg: ast.unparse(key.value) for key in call.keywords}
        if said.get("trust_remote_code") != "False":
            silent.append(f"{path}:{call.lineno}")
    assert not silent


def test_no_model_computes_with_code_of_the_hub():
    """transformers takes its kernels from 5.25 on, unless it is told not to."""
    said = [
        {key.arg: ast.unparse(key.value) for key in call.keywords}
        for _, call in calls()
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
    ]
    of_models = [each.get("use_kernels") for each in said if "dtype" in each]
    assert of_models == ["False"] * 2


def test_nothing_is_read_or_written_as_a_pickle():
    """Also not what a killed run leaves for the next."""
    of_pickles = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dumps"}
    assert [path for path, call in calls() if ast.unparse(call.func) in of_pickles] == []


def test_few_lines_ask_which_part_something_is():
    asked = {
        f"{path}:{node.lineno}"
        for path, nodes in tree_of_files().items()
        for node in nodes
        if node_of(path) not in ("selection", "architecture") and isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Constant) and side.value in PARTS
    }
    assert len(asked) < 25, "a rule about a part of a model has one place"


def test_nothing_at_import_time_excludes_an_operating_system():
    """What some systems lack is imported by whoever needs it, where it is needed."""
    lacking = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "winreg"}
    for path, (module, *_) in tree_of_files().items():
        names = [name for statement in module.body for name in names_in(statement)]
        assert not lacking & {name.partition(".")[0] for name in names}, path


def test_every_package_has_a_folder_of_tests():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    tested = {path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")}
    assert packages - tested == set()


def test_every_file_that_a_command_names_is_there():
    commands = [REPOSITORY / name for name in ("Makefile", ".ci/run", ".ci/versions")]
    text = "".join(path.read_text(encoding="utf-8") for path in commands)
    named = re.findall(r"[\w./-]+/[\w.-]+\.(?:py|json|md)", text)
    assert named
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
