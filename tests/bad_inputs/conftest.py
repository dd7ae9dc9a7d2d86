"""Fixtures of the catalogue: originals made once, and a place for each case."""

import shutil
import tempfile
from pathlib import Path

import pytest

from bad_inputs.catalogue import Place
from cfsp.cli import main
from tiny_models import build_tiny_model


@pytest.fixture(scope="session")
def originals(tiny_checkpoint, text_file, tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("originals")
    llama, other = str(tiny_checkpoint("llama")), str(tiny_checkpoint("qwen3"))
    text = ["--data", str(text_file), "--samples", "4", "--seqlen", "32"]
    budget = ["--sparsity", "0.4", "--multiple", "4"]
    sharded = directory / "sharded"
    shutil.copytree(llama, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    build_tiny_model("llama").save_pretrained(sharded, max_shard_size="50KB")
    pruned = ["prune", llama, *text, *budget, "--out", str(directory / "pruned")]
    calibrated = ["calibrate", other, *text, "--out", str(directory / "statistics")]
    planned = ["prune", other, "--statistics", str(directory / "statistics"), *budget, "--dry-run"]
    for argv in (pruned, calibrated, [*planned, "--out", str(directory / "plan")]):
        assert main(argv) == 0
    return {
        "gpt2": tiny_checkpoint("gpt2"),
        "model": Path(llama),
        "sharded": sharded,
        "pruned": directory / "pruned",
        "text": text_file,
        "plan": directory / "pruned" / "cfsp_plan.json",
        "statistics": directory / "pruned" / "cfsp.statistics",
        "other_plan": directory / "plan" / "cfsp_plan.json",
        "other_statistics": directory / "statistics",
    }


@pytest.fixture
def place(originals, tmp_path, monkeypatch) -> Place:
    place = Place(originals, tmp_path / "case")
    monkeypatch.chdir(place.work)
    monkeypatch.setenv("CFSP_CACHE", str(place.cache))
    monkeypatch.setattr(tempfile, "tempdir", str(place.temporary))
    return place
