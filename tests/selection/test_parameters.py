"""What may go for a goal of parameters where nobody said it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import cfsp
from builders import job_of
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.cli import main
from cfsp.errors import BudgetError
from cfsp.planning.make import model_size
from cfsp.result.manifest import read_manifest
from cfsp.selection import goal
from cfsp.selection.goal import MANY_CHANNELS, constraint_of
from cfsp.settings import Budget, Compute, PruneSettings, TargetParameters
from cfsp.streaming.work_dir import WorkDir
from commands_of_goals import prune
from drawn_windows import draw_windows
from tiny_decoders import tiny_config
from tiny_models import build_tiny_model

OPEN = PruneSettings(Budget(multiple=8), compute=Compute("cpu", "float32"), leaves_parts_open=True)


@pytest.fixture
def draw(tokenizer: Any, text_file: Path) -> Any:
    windows = draw_windows([str(text_file)], tokenizer, samples=4, seqlen=16)
    return lambda: windows


def stays_without(source: WeightSource, share: float) -> float:
    """Return what stays of the parameters where a share of the FFN channels goes."""
    size = model_size(source)
    owned = size.of_parts(["ffn"])
    return 1 - share * owned.cost_of(owned.width_U) * owned.parameters_per_cost / size.parameters


def parts_of(source: WeightSource, stays: float, draw: Any, **settings: Any) -> tuple[str, ...]:
    asked = replace(OPEN, goal=TargetParameters(stays), **settings)
    job, _ = constraint_of(job_of(source, asked, draw))
    return job.budget.parts


def never() -> Any:
    raise AssertionError("this is not needed")


def test_blocks_are_tried_where_many_channels_would_go(
    model: Path, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_checkpoint(model)
    caplog.set_level(logging.INFO)
    # No text is drawn to find that out.
    assert parts_of(source, stays_without(source, MANY_CHANNELS - 0.01), never) == ("ffn",)
    assert not caplog.text
    assert parts_of(source, stays_without(source, MANY_CHANNELS + 0.01), draw) == ("ffn", "blocks")
    assert "41% of the FFN channels would go alone: whole blocks are tried" in caplog.text
    # More than the channels own.
    assert parts_of(source, stays_without(source, 1.1), draw) == ("ffn", "blocks")
    assert "all FFN channels would not be enough" in caplog.text


def test_channels_go_alone_where_blocks_cannot_be_compared_and_it_is_said(
    model: Path, draw: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(model)
    stays = stays_without(source, 0.6)
    caplog.set_level(logging.INFO)

    def check(why: str, stays: float = stays, draw: Any = draw, **settings: Any) -> None:
        caplog.clear()
        assert parts_of(source, stays, draw, **settings) == ("ffn",)
        assert f"{why}: whole blocks are not tried" in caplog.text

    with_images = replace(draw(), images_N=({"pixels": torch.zeros(1)},) * 4)
    check("the text has images", draw=lambda: with_images)
    monkeypatch.setattr(goal, "has_room_for_two", lambda *_: False)
    check(
        "60% of the FFN channels would go alone, and there is no memory for a pruned model beside "
        "the dense one"
    )


@pytest.mark.parametrize(
    "config",
    [
        # Each of its blocks has an embedding of its own.
        tiny_config("gemma3n_text", num_kv_shared_layers=0),
        tiny_config("llama", num_hidden_layers=1),
    ],
    ids=["gemma3n_text", "one block"],
)
def test_channels_go_alone_where_no_block_can(config: Any, draw: Any) -> None:
    source = LoadedModel(AutoModelForCausalLM.from_config(config).eval())
    for share in (0.6, 0.9):
        assert parts_of(source, stays_without(source, share), draw) == ("ffn",)


def test_what_neither_channels_nor_blocks_own_is_refused(model: Path, draw: Any) -> None:
    with pytest.raises(BudgetError, match="at least one of 3 blocks must stay; between 0 and"):
        parts_of(open_checkpoint(model), 0.05, draw)


def test_a_command_that_names_no_parts(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stays = f"{stays_without(open_checkpoint(model), 0.6):.4f}"

    def pruned(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        command = ["prune", str(model), "--data", str(text_file), "--samples", "8"]
        command += ["--seqlen", "32", "--set", "multiple=8", "--target-params", stays]
        assert main([*command, "--out", str(out), *more]) == 0
        found = read_manifest(out) if "--dry-run" not in more else {}
        assert found is not None
        return found

    manifest = pruned("open")
    assert manifest["criterion"]["parts"] == ["ffn", "blocks"]
    assert abs(manifest["parameters_after"] / manifest["parameters_before"] - float(stays)) < 0.02
    assert "60.0% of the FFN channels: divergence" in (shown := capsys.readouterr().err)
    assert "1 block and" in shown
    # One pass, without trying anything; so it is said.
    assert pruned("fast", "--effort", "fast")["goal"]["chosen"]["parts"] == ["ffn"]
    found = capsys.readouterr()
    assert "blocks are tried" not in found.err
    assert "may cost less with `--parts ffn,blocks`" in found.out
    pruned("dry", "--dry-run")
    assert "--dry-run compared plans before repair" in capsys.readouterr().err


def test_a_model_in_memory_loses_blocks_too(tokenizer: Any, text_file: Path) -> None:
    model = build_tiny_model("llama")
    target = TargetParameters(stays_without(LoadedModel(model), 0.9))
    more: dict[str, Any] = {
        "data": [str(text_file)], "samples": 8, "seqlen": 32, "multiple": 8,
    }  # fmt: skip
    open_ = cfsp.prune(model, tokenizer, goal=target, **more)
    named = cfsp.prune(model, tokenizer, goal=target, parts="ffn,blocks", **more)
    for name, tensor in named.state_dict().items():
        torch.testing.assert_close(open_.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_resumed_run_keeps_what_it_had_decided(
    model: Path, draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(model)
    settings = replace(OPEN, goal=TargetParameters(stays_without(source, 0.6)))
    work_dir = WorkDir(tmp_path, identity={"of": "one command"})

    def parts() -> tuple[str, ...]:
        return constraint_of(job_of(source, settings, draw, work_dir=work_dir))[0].budget.parts

    assert parts() == ("ffn", "blocks")
    monkeypatch.setattr(goal, "has_room_for_two", lambda *_: False)
    assert parts() == ("ffn", "blocks")


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_target_params(model: Path, text_file: Path, tmp_path: Path, repair: str) -> None:
    out = tmp_path / "out"
    assert (
        prune(model, text_file, out, "--target-params", 0.75, "--parts", "ffn", "--repair", repair)
        == 0
    )
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["parameters_before"], manifest["parameters_after"]
    multiple = 8 * 3 * 32
    assert abs(after - 0.75 * before) <= multiple
    assert manifest["goal"]["goal"] == "target_params"
    assert manifest["goal"]["asked"] == 0.75
    assert manifest["goal"]["chosen"]["parts"] == ["ffn"]
    assert manifest["goal"]["chosen"]["sparsity"] == pytest.approx(manifest["ffn_sparsity"], 0.05)
    assert "0.75 of all parameters" in (out / "README.md").read_text()


def test_target_params_in_equal_widths(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--target-params", 0.75, "--widths", "equal")
    assert prune(model, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert len(set(manifest["intermediate_sizes"])) == 1
    assert manifest["criterion"]["block_metric"] == "uniform"
    # A stock config says it: no code, no flag.
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
