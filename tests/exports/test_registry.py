"""The one way through all targets: what is refused, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError, OutputError, UsageError
from cfsp.exports import decilm
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.verification import ExportOptions
from ragged import cut
from tiny_models import build_tiny_model


def test_no_verify(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    report = export_checkpoint(source, "vllm", tmp_path / "out", verify=False)
    assert report.verification is None
    assert set(report.seconds) == {"write"}
    assert report.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_bad_requests(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    with pytest.raises(UsageError, match="unknown target 'onnx'; expected one of gguf, vllm"):
        export_checkpoint(source, "onnx", tmp_path / "x")
    with pytest.raises(UsageError, match="unknown target 'padded'; the padded copy went"):
        export_checkpoint(source, "padded", tmp_path / "x")
    with pytest.raises(UsageError, match="--type belongs to gguf and openvino"):
        export_checkpoint(source, "vllm", tmp_path / "x", ExportOptions("f16"))
    with pytest.raises(OutputError, match="exists and is not empty"):
        export_checkpoint(source, "vllm", tmp_path / "dense")


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decilm, "write_shards", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_checkpoint(source, "vllm", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}


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
