"""What an earlier version had is refused with a sentence on what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.cli import main
from cfsp.errors import GONE

# A command that still asks for it.
ASKING = {
    "self": "prune {model} --sparsity 0.2 --data self --out smaller",
    "--png": "report smaller --png charts",
    "openvino": "bench copy --engine openvino",
    "sglang": "export pruned --to sglang --out copy",
    "tensorrt-llm": "export pruned --to tensorrt-llm --out copy",
    "padded": "export pruned --to padded --out copy",
    "dora": "recover pruned --method dora --out recovered",
}


@pytest.mark.parametrize("word", GONE)
def test_what_went_is_said(
    word: str, tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ASKING[word].format(model=tiny_checkpoint("llama"))
    try:
        status = main(command.split())
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status == 2
    assert GONE[word] in capsys.readouterr().err
