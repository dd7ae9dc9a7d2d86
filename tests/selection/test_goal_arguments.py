"""What says how much goes: one thing, in its range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cfsp
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.errors import UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.prune_report import PruneReport
from cfsp.settings import (
    TargetParameters,
)
from commands_of_goals import prune


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --sparsity"),
        (["--sparsity", "0.5", "--target-params", "0.5"], "--sparsity and --target-params"),
        (["--target-speedup", "1.2", "--max-loss-increase", "1"], "found --target-speedup and"),
        (
            ["--parts", "ffn,kv", "--sparsity", "0.2"],
            "several share one target, --target-params or --target-speedup or --max-loss-increase",
        ),
        (
            ["--parts", "blocks", "--remove", "1", "--sparsity", "0.2"],
            "found --sparsity and --remove",
        ),
        (["--parts", "ffn,blocks", "--remove", "1"], "belongs to one of --parts attention"),
        (["--parts", "ffn,experts", "--target-params", "0.8"], "whole experts go alone"),
        (["--sparsity", "0.5", "--target-speedup-of", "decode"], "belongs to --target-speedup"),
        (["--target-params", "0"], "--target-params must be in (0, 1], such as 0.7, found 0.0"),
        (["--target-params", "1.5"], "--target-params must be in (0, 1]"),
        (["--target-params", "nan"], "--target-params must be in (0, 1]"),
        (["--target-speedup", "1"], "--target-speedup must be above 1"),
        (["--max-loss-increase", "-1"], "--max-loss-increase must be above 0"),
        (["--max-loss-increase", "nan"], "--max-loss-increase must be above 0"),
        (["--target-params", "0.01"], "cannot remove 99.0% of the model's parameters"),
        (["--max-loss-increase", "1", "--statistics", "s"], "--statistics exclude each other"),
        (["--plan", "p.json", "--target-params", "0.5"], "--plan and --target-params exclude"),
    ],
)
def test_impossible_goals_are_one_sentence(
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    capsys.readouterr()
    assert prune(model, text_file, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_numbers_of_what_goes_whole_need_no_sparsity(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["--parts", "blocks", "--set", "remove=1", "--effort", "fast"]
    assert prune(model, text_file, tmp_path / "out", *arguments) == 0
    in_python = cfsp.prune(
        model, out=tmp_path / "python", parts="blocks", remove=1, effort="fast",
        data=[str(text_file)], samples=2, seqlen=16,
    )  # fmt: skip
    assert isinstance(in_python, PruneReport)
    assert len(in_python.plan.removed_blocks) == 1
    assert len(PruningPlan.load(tmp_path / "out" / PLAN_FILE).removed_blocks) == 1
    statistics = cfsp.calibrate(model, parts="blocks", data=[text_file], samples=8, seqlen=32)
    planned = cfsp.plan(model, statistics, parts="blocks", remove=1)
    assert len(planned.removed_blocks) == 1


def test_python_wants_a_sparsity_or_a_goal(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        cfsp.prune(model, out=tmp_path / "out")
    with pytest.raises(UsageError, match="--sparsity and --target-params"):
        cfsp.prune(model, out=tmp_path / "out", sparsity=0.5, goal=TargetParameters(0.5))


def test_python_refuses_what_the_command_line_does(model: Path, tmp_path: Path) -> None:
    def refused(message: str, **asked: Any) -> None:
        with pytest.raises(UsageError, match=message):
            cfsp.prune(model, out=tmp_path / "out", sparsity=0.5, **asked)

    refused("--effort fast is --repair none; give one of the two", effort="fast", repair="ridge")
    refused("--local-steps belongs to --repair local", repair="ridge", local_steps=2)
    refused("--local-text belongs to --repair local", local_text=0.5)


def test_a_plan_may_have_a_goal(model: Path, text_file: Path) -> None:
    statistics = cfsp.calibrate(model, data=[text_file], samples=4, seqlen=32)
    by_name = cfsp.plan(model, statistics, target_params=0.8, multiple=8)
    assert by_name == cfsp.plan(model, statistics, goal=TargetParameters(0.8), multiple=8)
    assert 0.2 < by_name.ffn_sparsity < 1
    with pytest.raises(UsageError, match="unknown argument max_loss_increase"):
        cfsp.plan(model, statistics, max_loss_increase=0.1)
