"""What docs/TRUST.md promises besides the catalogue of bad input in tests/bad_inputs."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cfsp
from builders import statistics_with_distances
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.gguf_header import check_gguf
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import exclusive, staged_directory, staged_file
from cfsp.checkpoint.shards import INDEX_FILE, weight_files
from cfsp.cli import main
from cfsp.errors import OutputError
from cfsp.pipeline import calibrate_source, plan_from
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings
from cfsp.text.tokenizers import load_tokenizer
from commands import Command, Commands
from conftest import REPOSITORY, random_prose
from targets import only_our_errors
from tiny_models import save_tiny_model

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# Any bytes.


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a valid file with a piece replaced, repeated or left out."""
    begin = draw(st.integers(0, len(whole)))
    end = draw(st.integers(begin, min(len(whole), begin + 40)))
    return whole[:begin] + draw(st.binary(max_size=16)) + whole[end:]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    save_tiny_model("llama", directory, max_shard_size="50KB")
    return directory


@given(st.data())
@FUZZ
def test_any_index_is_an_index_or_a_checkpoint_error(sharded: Path, data: st.DataObject) -> None:
    path = sharded / INDEX_FILE
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(st.one_of(st.binary(max_size=60), mutated(whole))))
        only_our_errors(lambda: weight_files(sharded))
    finally:
        path.write_bytes(whole)


@given(st.data())
@FUZZ
def test_any_statistics_are_statistics_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "s.safetensors"
    statistics_with_distances([0.1, 0.2]).save(path)
    path.write_bytes(data.draw(st.one_of(st.binary(max_size=60), mutated(path.read_bytes()))))
    only_our_errors(lambda: Statistics.load(path))


@given(st.binary(max_size=300))
@FUZZ
def test_any_plan_file_is_a_plan_or_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    only_our_errors(lambda: PruningPlan.load(tmp_path / "plan.json"))


@given(st.binary(max_size=120))
@FUZZ
def test_any_gguf_header_is_walked_within_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + data)
    only_our_errors(lambda: check_gguf(tmp_path / "a.gguf"))


# What is quoted.


def test_a_message_is_one_printable_line() -> None:
    error = OutputError("no tensor named\na\x1b[2Jb\ud800 \N{RIGHT-TO-LEFT OVERRIDE}c, größer")
    assert str(error) == r"no tensor named\na\x1b[2Jb\ud800 \u202ec, größer"


def test_a_card_quotes_foreign_text_as_code(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "<script>`[x](y)`|"
    shutil.copytree(tiny_checkpoint("llama"), model)
    text = tmp_path / "<b>`text`\n# |.txt"
    text.write_text(random_prose(2000, seed=3))
    argv = ["prune", str(model), "--sparsity", "0.4", "--multiple", "4", "--data", str(text)]
    argv += ["--samples", "4", "--seqlen", "32", "--eval", str(text), "--windows", "1"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    outside_code = re.sub(r"^ {4}.*$", "", re.sub(r"`[^`\n]*`", "", card), flags=re.MULTILINE)
    for foreign in ("<script>", "<b>", "[x]", "# |"):
        assert foreign not in outside_code
    (row,) = [line for line in card.splitlines() if line.startswith("| `")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells


# Two runs, one output.


def test_one_run_at_a_time_in_a_directory(tmp_path: Path) -> None:
    with exclusive(tmp_path / "place"):
        with (
            pytest.raises(OutputError, match=r"another run is working in .*place; wait for it"),
            exclusive(tmp_path / "place"),
        ):
            pass
        assert (tmp_path / "place").is_dir()
    with exclusive(tmp_path / "place"):
        pass
    assert not (tmp_path / "place").exists()


def test_the_first_of_two_outputs_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists and is not empty; choose another"),
        staged_directory(tmp_path / "out") as staging,
    ):
        (staging / "file").write_text("second")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"
    with (
        pytest.raises(OutputError, match=r"another run has written .*meanwhile"),
        staged_file(tmp_path / "one") as staged,
    ):
        staged.write_text("second")
        (tmp_path / "one").write_text("first")
    assert (tmp_path / "one").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "one"}


def test_a_sweep_where_another_one_works_is_refused(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["sweep", str(tiny_checkpoint("llama")), "--sparsity", "0.4", "--data", str(text_file)]
    with exclusive(tmp_path / "out"):
        assert main([*argv, "--eval", str(text_file), "--out", str(tmp_path / "out")]) == 2
    assert "another run is working in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "calibrate", "recover"])
def test_of_two_processes_one_wins(
    command: str,
    commands: Commands,
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model, out = str(tiny_checkpoint("llama")), tmp_path / "out"
    drawn = ["--data", str(text_file), "--seqlen", "32"]
    options = {
        "prune": ["--sparsity", "0.4", "--multiple", "4", "--samples", "8"],
        "calibrate": ["--samples", "8"],
        "recover": ["--rank-allocation", "uniform", "--steps", "2"],
    }
    argv = [command, model, *drawn, *options[command], "--out", str(out)]
    first, second = sorted(commands(Command(argv), Command(argv)), key=lambda it: it.status)
    assert (first.status, second.status) == (0, 2), (first.stderr, second.stderr)
    message = second.stderr.splitlines()[-1]
    assert "another run is working in" in message or f"{out} exists" in message
    assert "Traceback" not in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if command != "calibrate":
        assert main(["inspect", str(out)]) == 0


# Long life.


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc here")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def test_many_prunes_do_not_grow_memory(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def prune(number: int) -> None:
        cfsp.prune(
            tiny_checkpoint("llama"),
            out=tmp_path / str(number),
            sparsity=0.4,
            multiple=4,
            data=[str(text_file)],
            samples=4,
            seqlen=32,
        )

    prune(0)
    prune(1)
    before = resident_bytes()
    for number in range(2, 12):
        prune(number)
    assert resident_bytes() - before < 64 << 20


def test_a_thousand_plans_do_not_grow_memory(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    text = CalibrationText((str(text_file),), samples=2, seqlen=32)
    compute = Compute("cpu", "float32")
    tokenizer = load_tokenizer(source.directory)
    calibrate_source(source, tokenizer, text, compute).save(tmp_path / "s")

    def plan(number: int) -> None:
        settings = PruneSettings(Budget(0.1 + 0.0008 * number, multiple=4), compute=compute)
        plan_from(source, Statistics.load(tmp_path / "s"), settings)

    for number in range(20):
        plan(number)
    before = resident_bytes()
    for number in range(1000):
        plan(number)
    # Statistics and plans that were all kept would be more.
    assert resident_bytes() - before < 8 << 20


# The document.


def promised_tests() -> list[str]:
    text = (REPOSITORY / "docs" / "TRUST.md").read_text(encoding="utf-8")
    return re.findall(r"`((?:\w+/)?test_\w+\.py(?:::\w+)?)`", text)


def test_every_test_named_in_the_document_exists() -> None:
    named = promised_tests()
    assert len(named) > 15
    for name in named:
        file, _, function = name.partition("::")
        path = REPOSITORY / "tests" / file
        assert path.is_file(), name
        if function:
            assert f"def {function}(" in path.read_text(encoding="utf-8"), name
