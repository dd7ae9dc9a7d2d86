"""The command line: its flow on a tiny model, its JSON, and one sentence for every bad input."""

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch

import cfsp
from builders import entries, raising, read_json, stop
from cfsp.checkpoint.tensor_file import FileTensor
from cfsp.cli import COMMANDS, build_parser, main
from cfsp.cli.options import expand_sets, settings_from
from cfsp.cli.output import show_messages, tell
from cfsp.errors import ELSEWHERE, UsageError, first_line
from cfsp.result.manifest import read_manifest
from cfsp.result.names import public_command
from cfsp.settings import Budget, CalibrationText, Criterion, EvaluationText
from cfsp.text.drawing import draw_text, say_default
from cfsp.text.windows import Windows
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model


@pytest.fixture
def told(command):
    """What a command says as JSON, which fails unless it is exactly one value."""
    return lambda *argv: json.loads(command(*argv, "--json").out)


@pytest.fixture
def text(text_file):
    """The calibration arguments of all tests here."""
    return ["--data", text_file, "--samples", 6, "--seqlen", 32]


def test_a_terminal_without_a_minus_is_told_all_the_same(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    tell((None, lambda: print("10 \N{MULTIPLICATION SIGN} \N{MINUS SIGN}3")), as_json=False)
    assert written.getvalue() == b"10 \xd7 \\u22123\n"


def test_json_has_no_number_that_is_none(capsys):
    tell(({"a": [float("inf"), -float("inf"), float("nan"), 1e-7]}, print), as_json=True)
    assert "".join(capsys.readouterr().out.split()) == '{"a":[null,null,null,1e-07]}'


def test_an_output_in_the_home_directory(command, pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command("report", pruned, "--out=~/page.html")
    cfsp.export(str(pruned), to="vllm", out="~/copy")
    assert entries(tmp_path) == {"page.html", "copy"}


# Help.


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["prune", "--help"],
        ["--version"],
        ["inspect", "./no/such"],
        ["prune", "demo", "--sparsity", "0.2", "--out", "x", "--eval", "nothing.txt"],
    ],
)
def test_what_answers_at_once_does_not_import_torch(argv):
    code = (
        "import sys\nfrom cfsp.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "cfsp" in finished.stdout + finished.stderr


def test_a_shell_can_complete_it():
    shtab = pytest.importorskip("shtab", reason="shtab is not installed")
    script = shtab.complete(build_parser(), shell="bash")
    assert script.rstrip().endswith(" -F _shtab_cfsp cfsp")  # README adds file names to it
    (options,) = re.findall(r"_shtab_cfsp_prune_option_strings=\((.*)\)", script)
    assert {"--sparsity", "--data"} <= set(options.split())


def test_a_process_that_a_library_forked_dies_of_a_polite_kill_in_silence():
    script = """
import os, signal, time
import cfsp.cli
def wait(args):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        # Only now: Python forgets a signal that arrives before its side of the fork is done.
        os.write(writes, b"ready")
        time.sleep(60)
        os._exit(0)
    os.read(reads, 5)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
cfsp.cli.families.run = wait
cfsp.cli.main(["families"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("-15\n", "")


def test_what_is_typed_becomes_settings_and_the_rest_is_theirs():
    argv = ["prune", "m", "--out", "o", "--sparsity", "20%", "--data", "a", "--data", "b"]
    args = build_parser().parse_args(expand_sets([*argv, "--set", "multiple=8"]))
    assert settings_from(args, Budget) == Budget(0.2, multiple=8)
    args = build_parser().parse_args([*argv, "--multiple", "auto", "--widths", "equal"])
    assert settings_from(args, Budget) == Budget(0.2, widths="equal")
    args = build_parser().parse_args([*argv, "--windows", "all"])
    assert settings_from(args, EvaluationText) == EvaluationText(windows=None)
    assert settings_from(args, CalibrationText) == CalibrationText(("a", "b"))
    assert settings_from(args, Criterion) == Criterion()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_help_all_names_the_rest(command, name):
    short, long = (command(name, option).out for option in ("--help", "--help-all"))
    assert f"example:\n  cfsp {name}" in short
    assert name not in ("prune", "recover", "sweep") or "\nwindows=... " in long
    positional = {"eval": "MODEL ...", "bench": "MODEL ...", "sweep": "MODEL"}
    if name in positional:
        assert short.startswith(f"usage: cfsp {name} [options] {positional[name]}\n")
    assert len(re.findall(r"^  --", short, re.MULTILINE)) <= (14 if name == "prune" else 17)
    assert name != "prune" or len(short.splitlines()) <= 40
    if "--set" in short:
        assert len(long) > len(short)
    else:
        assert long == short


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        # Advanced options are checked as others are.
        ("--set block_metrik=x", "unknown argument --block-metrik=x; did you mean --block-metric?"),
        ("--set foo=1", "unknown argument --foo=1; see: cfsp prune --help"),
        ("--set block_metric=unifom", "found 'unifom'; did you mean uniform?"),
        ("--set multiple", "--set needs NAME=VALUE, found 'multiple'"),
        ("--set multiple=", "expected a value after --multiple, found nothing"),
        ("--set multiple=--", "expected a value after --multiple, found nothing"),
        ("--set target_kv_cache=0,5", "expected a fraction such as 0.2 or 20%, found '0,5'"),
        # A word too many is told how its option takes several.
        ("--data a.txt b.txt", "unknown argument b.txt; give --data before each: --data b.txt;"),
        ("--data=a.txt b.txt", "unknown argument b.txt; give --data before each: --data b.txt;"),
        ("--parts ffn kv", "argument kv; --parts takes several with commas between and no spaces;"),
        ("--keep 0 1", "unknown argument 1; --keep takes several with commas between and no"),
        ("--sparsity 0.2 more", "unknown argument more; see: cfsp prune --help"),
    ],
)
def test_what_no_option_takes_is_told(command, typed, message):
    assert message in command("prune", "m", "--out", "o", *typed.split(), status=2).err


def test_the_default_text_is_told_once_when_it_is_read(
    command, model, text_file, tmp_path, monkeypatch
):
    def draw(text: CalibrationText, *others: Any) -> Windows:
        return draw_text(replace(text, names=(str(text_file),)), *others)

    monkeypatch.setattr("cfsp.text.drawing.draw_text", draw)
    say_default.cache_clear()
    prune = ("prune", model, "--sparsity", 0.3, "--samples", 6, "--seqlen", 32, "--out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a-file").touch()
    assert "calibrating on" not in command(*prune, tmp_path / "full", status=2).err
    told = command(*prune, tmp_path / "out").err + command(*prune, tmp_path / "another").err
    assert told.count("calibrating on mixed, text of many kinds") == 1


# The flow.


def test_calibrate_plan_prune_is_prune_in_three_steps(told, model, text, tmp_path):
    statistics, plan = tmp_path / "s.safetensors", tmp_path / "dry" / "cfsp_plan.json"
    budget: list[object] = ["--sparsity", 0.4, "--multiple", 1]

    facts = told("calibrate", model, "--out", statistics, *text)
    assert facts["out"] == str(statistics)
    assert facts["calibration_tokens"] == 6 * 32
    assert facts["blocks"] == 3
    dry: list[object] = ["--statistics", statistics, "--repair", "none", "--dry-run", *budget]
    planned = told("prune", model, "--out", tmp_path / "dry", *dry)

    outs = {
        "by plan": ["--plan", plan],
        "by statistics": ["--statistics", statistics, *budget],
        "at once": [*budget, *text],
    }
    weights = set()
    for name, options in outs.items():
        report = told("prune", model, "--out", tmp_path / name, "--repair", "none", *options)
        assert report["intermediate_sizes"] == planned["intermediate_sizes"]
        assert report["calibration_tokens"] == 6 * 32
        weights.add((tmp_path / name / "model.safetensors").read_bytes())
        assert (tmp_path / name / "cfsp_plan.json").read_bytes() == plan.read_bytes()
    assert len(weights) == 1


def test_prune_reports_all_that_the_readme_promises(told, model, text, text_file, tmp_path):
    out = tmp_path / "out"
    argv = [
        "prune", model, "--out", out, "--sparsity", 0.4, "--set", "multiple=4", *text,
        "--eval", text_file, "--windows", 2,
    ]  # fmt: skip
    report = told(*argv)
    before = sum(p.numel() for p in build_tiny_model("llama").parameters())
    removed = 3 * 96 - sum(report["intermediate_sizes"])
    assert report["parameters_before"] == before
    assert report["parameters_after"] == before - removed * 3 * 32
    assert report["ffn_sparsity"] == pytest.approx(removed / (3 * 96), abs=1e-6)
    assert report["ffn_sparsity"] == pytest.approx(0.4, abs=4 / (3 * 96))
    assert report["model_sparsity"] == pytest.approx(removed * 96 / before, abs=1e-6)
    assert report["calibration_tokens"] == 192
    assert report["peak_rss_bytes"] > 50e6
    assert report["out"] == str(out)
    stages = ["evaluate", "text", "coarse pass", "sensitivity", "ridge", "cut"]
    assert list(report["seconds"]) == stages
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    value = report["perplexity"][str(text_file)]
    # Windows of what the model can read, not of --seqlen, as those of `cfsp eval` are.
    assert (value["seqlen"], value["windows"], value["tokens"]) == (256, 2, 2 * 255)
    measured = told("eval", model, out, "--data", text_file, "--windows", 2)["models"]
    for side, found in zip(("before", "after"), measured, strict=True):
        again = found["perplexity"][str(text_file)]
        assert again.pop("value") == value[side] > 1
        assert again.items() <= value.items()
    manifest = read_json(out / "cfsp.json")
    assert {key: manifest[key] for key in report} == report | {"out": out.name}
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["command"] == public_command(shlex.join(["cfsp", *map(str, argv), "--json"]))
    assert str(tmp_path) not in manifest["command"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("--sparsity 0.01", "the least that can go is more"),
        (
            "--parts blocks --target-params 0.99",
            "the least that can go is more than what was asked for\n",
        ),
        ("--parts blocks --target-params 1", "as it was asked for"),
        ("--sparsity 0", "as it was asked for"),
        (
            "--sparsity 0.1 --multiple 48 --widths equal",
            "the least that can go is more than what was asked for, in multiples of 48; give a sm",
        ),
    ],
)
def test_nothing_removed_is_said(command, model, text, tmp_path, asked, why):
    told = command("prune", model, "--out", tmp_path / "out", *asked.split(), *text).out
    assert f"nothing was removed: {why}" in told and "repaired" not in told
    assert "cut " in told and "evaluate" not in told  # no stage that did not run


def test_dry_run_writes_only_the_plan(command, told, model, text, tmp_path):
    argv = ["prune", model, "--out", tmp_path / "dry", "--sparsity", 0.4, "--dry-run", *text]
    out = command(*argv).out
    assert entries(tmp_path / "dry") == {"cfsp_plan.json"}
    assert f"plan written to {tmp_path}/dry/cfsp_plan.json" in out
    plan = cfsp.PruningPlan.load(tmp_path / "dry" / "cfsp_plan.json")
    for unit in plan.units:
        assert f"{unit.distance:.4f}" in out
        assert str(len(unit.kept)) in out
    made = ["--plan", tmp_path / "dry" / "cfsp_plan.json", "--out", tmp_path / "again"]
    again = command("prune", model, "--dry-run", *made).out  # nothing takes time
    assert "\npeak memory" in again and "\n;" not in again
    report = told(*[tmp_path / "json" if arg == tmp_path / "dry" else arg for arg in argv])
    assert report["out"] is None
    assert report["intermediate_sizes"] == plan.kept_widths
    for samples, repair, differs in ((8, "ridge", False), (9, "ridge", True), (9, "none", False)):
        argv[3] = tmp_path / f"{samples}-{repair}"
        error = command(*argv, "--samples", samples, "--repair", repair).err
        assert ("the run itself from 8 of them before it repairs" in error) == differs


def test_inspect(command, told, model, pruned):
    dense = told("inspect", model)
    assert dense["family"] == "llama"
    assert dense["blocks"] == 3
    assert dense["intermediate_sizes"] == [96, 96, 96]
    assert dense["pruned"] is None
    assert dense["parameters"] == sum(p.numel() for p in build_tiny_model("llama").parameters())
    manifest, found = read_manifest(pruned), told("inspect", pruned)
    assert manifest is not None
    assert found["intermediate_sizes"] == manifest["intermediate_sizes"]
    assert found["parameters"] == manifest["parameters_after"]
    assert found["pruned"]["ffn_sparsity"] == manifest["ffn_sparsity"]
    assert found["pruned"]["criterion"]["sparsity"] == 0.5
    out = command("inspect", pruned).out
    assert "llama, 3 blocks" in out
    assert str(model) in out


def test_inspect_shows_blocks_with_several_ffns_and_with_none(command, told, save):
    model = save(tiny_model("nemotron_h"))
    facts = told("inspect", model)
    assert facts["units"][0] == {"block": 1, "path": "mixer.experts", "width": 64, "ffns": 4}
    assert facts["intermediate_sizes"] == [64, 96, 96]
    assert {line.strip() for line in command("inspect", model).out.splitlines()} >= {
        "intermediate size  mixer.experts (4 experts) in block 1: 64",
        "mixer.shared_experts in block 1: 96",
        "mixer in block 3: 96",
        "no FFN in blocks 0, 2",
    }


# Bad input: exit 2, one sentence, nothing left behind.

# Where a command takes names of a kind; the rest of what other tools have are options.
PLACES = {
    "{} smaller owner/name": "push",
    "export pruned --to {} --out copy": "sglang tensorrt-llm",
    "recover pruned --method {} --out recovered": "dora",
    "prune no-model --sparsity 0.2 --set block_metric={} --out smaller": "cosine euclidean mse mae",
    "prune no-model --sparsity 0.2 --set channel_metric={} --out out": "wanda magnitude random",
}
ASKING = {word: asked for asked, words in PLACES.items() for word in words.split()}


@pytest.mark.parametrize("word", ELSEWHERE)
def test_the_command_says_what_to_do_instead(word, command):
    asked = ASKING.get(word, "recover pruned --steps 1 --out recovered --{} 1")
    assert ELSEWHERE[word] in command(*asked.format(word).split(), status=2).err


def test_so_does_python(tmp_path):
    with pytest.raises(UsageError, match=ELSEWHERE["weight-decay"]):
        cfsp.recover("none", out=tmp_path / "out", weight_decay=0.1)


def test_unknown_argument_exits_with_two(command):
    assert "COMMAND" in command(status=2).out
    told = "unknown argument --versoin; did you mean --version?"
    assert told in command("--versoin", status=2).err
    for argv in (["purge"], ["prune", "demo", "--sparsity", "0.2", "--out", ""]):
        assert "error:" in command(*argv, status=2).err
    for argv in (["--json", "verify", "demo"], ["--sparsity", "0.2", "prune", "demo"]):
        assert f"{argv[0]} stands before the command, expected" in command(*argv, status=2).err


def test_interrupt_says_that_nothing_was_written(command, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(FileTensor, "read", stop)
    argv = ["prune", model, "--out", tmp_path / "out", "--sparsity", 0.4, *text]
    assert "interrupted; nothing is half-written" in command(*argv, status=130).err
    assert entries(tmp_path) == set()


def error_of_a_full_memory() -> Exception:
    """Return what torch says where the CPU has no memory."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    return raised.value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
            "accelerator is full (OutOfMemoryError: CUDA out of memory. Tried 2 GiB);",
        ),
        (error_of_a_full_memory(), "you tried to allocate 4611686018427387904 bytes"),
        (MemoryError(), "memory is full, or what a limit leaves of it (MemoryError); smaller"),
        (RuntimeError("a bug"), None),
    ],
)
def test_memory_that_is_full_is_told_in_one_sentence(
    error, told, command, model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("cfsp.pipeline.decide", raising(error))
    argv = ["prune", model, "--out", tmp_path / "out", "--sparsity", 0.4, *text]
    if told is None:
        with pytest.raises(RuntimeError, match="a bug"):
            command(*argv)
    else:
        assert told in command(*argv, status=2).err.splitlines()[-1]
    assert entries(tmp_path) == set()


def test_threads_of_the_demo_do_not_spin_and_its_command_can_be_typed_again(tmp_path, monkeypatch):
    """A space in the output's name cut it in two."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # so that it is put back afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")
    told = []

    def look(*_: object, command: str) -> None:
        told.extend([os.environ.get("OMP_WAIT_POLICY"), *shlex.split(command)])
        raise UsageError("enough")

    monkeypatch.setattr("cfsp.checkpoint.locating.open_checkpoint", lambda _: None)
    monkeypatch.setattr("cfsp.pipeline.prune_checkpoint", look)
    argv = ["demo", "--out", str(tmp_path / "two words")]
    assert main(argv) == 2
    assert told == ["passive", "cfsp", *argv]


def test_messages_are_plain_lines_on_standard_error(capsys):
    show_messages()
    show_messages()  # of a second command in one process
    logging.getLogger("cfsp.streaming.block_pass").info("calibrate: going on at block 3 of 5")
    logging.getLogger("cfsp.selection").warning("100%% of %s", "it")
    logging.getLogger("cfsp").debug("for nobody")
    logging.getLogger("other").info("not ours")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "calibrate: going on at block 3 of 5\n100% of it\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\n one\ntwo"), "ValueError: one"),
        (TimeoutError(), "TimeoutError"),
        (KeyError("k" * 300), f"KeyError: '{'k' * 199}..."),
    ],
)
def test_of_what_a_library_says_a_line_is_told(error, told):
    """Some say nothing, which ended in a traceback of ours."""
    assert first_line(error) == told
