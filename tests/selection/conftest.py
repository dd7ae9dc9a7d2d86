"""The model of most tests of what goes, and the command that they give."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cfsp.checkpoint.reading import LoadedModel
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.manifest import read_manifest
from tiny_decoders import tiny_model


@dataclass(frozen=True)
class Ended:
    """What a command said, and what it wrote."""

    out: Path
    said: str
    error: str

    @property
    def manifest(self) -> Any:
        return read_manifest(self.out)

    @property
    def card(self) -> str:
        return (self.out / "README.md").read_text()

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.out / "cfsp_plan.json")


@pytest.fixture(scope="session")
def five_blocks() -> LoadedModel:
    """A Llama of five blocks in memory."""
    return LoadedModel(tiny_model("llama", num_hidden_layers=5))


@pytest.fixture
def prune(model, text_file, tmp_path, command) -> Callable[..., Ended]:
    """Prunes `model`, or another, by `cfsp prune` with a tiny calibration."""

    def run(*more: object, of: Path = model, name: str = "out", status: int = 0) -> Ended:
        text = ["--data", text_file, "--samples", 8, "--seqlen", 32]
        argv = ["prune", of, *text, "--multiple", 8, "--out", tmp_path / name]
        printed = command(*argv, *more, status=status)
        assert status == 0 or not list(tmp_path.glob(f"{name}*")), "it leaves nothing"
        return Ended(tmp_path / name, *printed)

    return run
