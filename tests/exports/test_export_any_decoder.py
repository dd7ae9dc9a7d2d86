"""Exports of decoders of any type: formats say what they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.registry import export_checkpoint


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("nemotron_h", "gguf", "export of nemotron_h models is not supported.*a stock one"),
        ("falcon", "vllm", "cannot express falcon; prune with --widths equal"),
        ("gpt_oss", "openvino", "export of gpt_oss models is not supported.*transformers runs"),
        (
            "gemma3",
            "openvino",
            "export of gemma3 models is not supported.*images too.*transformers runs",
        ),
        ("lfm2", "openvino", "export of lfm2 models is not supported: 1 of its 3 blocks"),
        ("bloom", "openvino", "export of bloom models is not supported: 0 of its 3 blocks"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(
    name: str, to: str, message: str, pruned_type: Callable[[str], Path], tmp_path: Path
) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    with pytest.raises(ExportError, match=message):
        export_checkpoint(Checkpoint(pruned_type(name)), to, out)
    assert not list(tmp_path.iterdir())
