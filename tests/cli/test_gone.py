"""What an earlier version had is refused with a sentence on what to do instead."""

from __future__ import annotations

import pytest

from cfsp.cli import main
from cfsp.gone import GONE

# A command that still asks for it.
ASKING = {
    "openvino": "bench copy --engine openvino",
    "sglang": "export pruned --to sglang --out copy",
    "tensorrt-llm": "export pruned --to tensorrt-llm --out copy",
    "padded": "export pruned --to padded --out copy",
    "dora": "recover pruned --method dora --out recovered",
}


@pytest.mark.parametrize("word", GONE)
def test_what_went_is_said(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(ASKING[word].split())
    assert stop.value.code == 2
    assert GONE[word] in capsys.readouterr().err
