"""Padded: every family becomes its plain stock class, with the same weights and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError, OutputError, UsageError
from cfsp.exports import padded
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.target import ExportOptions
from cfsp.exports.verification import logits_of, reference_model
from ragged import cut
from tiny_models import TINY_CONFIGS, build_tiny_model


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_stock_class_same_logits(tmp_path: Path, tokenizer: Any, name: str) -> None:
    source = cut(build_tiny_model(name), tokenizer, tmp_path)
    out = tmp_path / "padded"
    report = export_checkpoint(source, "padded", out)
    assert report.verification is not None
    # Zeros change no sum, but libraries may add up wider rows in another order.
    assert report.verification.relative_error <= 1e-6
    units = source.units
    widest = {unit.path: max(u.width for u in units if u.path == unit.path) for unit in units}
    whole = sum(widest[unit.path] for unit in units)
    zeros = whole - sum(unit.width for unit in units)
    assert f"{zeros:,} of {whole:,} channels are zeros" in report.notes[0]

    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert not list(out.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(out)  # no remote code
    assert type(stock).__name__ == source.architecture.class_name
    tokens = list(range(3, 40))
    found_TV, expected_TV = (
        logits_of(stock.eval(), tokens),
        logits_of(reference_model(source), tokens),
    )
    assert float((found_TV - expected_TV).abs().max()) <= report.verification.max_difference
    assert (out / "tokenizer.json").read_bytes() == (
        source.directory / "tokenizer.json"
    ).read_bytes()


def test_no_verify(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    report = export_checkpoint(source, "padded", tmp_path / "padded", verify=False)
    assert report.verification is None
    assert set(report.seconds) == {"write"}
    assert report.nbytes == sum(p.stat().st_size for p in (tmp_path / "padded").iterdir())


def test_nothing_to_pad(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    source = Checkpoint(tiny_checkpoint("qwen2"))
    report = export_checkpoint(source, "padded", tmp_path / "padded")
    assert report.notes == ("all blocks are equally wide: nothing was padded",)


def test_weights_in_the_padding_are_noticed_and_nothing_is_kept(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)

    def ones(layout: Any, tensor: torch.Tensor, width: int) -> torch.Tensor:
        shape = list(tensor.shape)
        axis = layout.axis.axis
        shape[axis] = width - tensor.shape[axis]
        return torch.cat([tensor, tensor.new_ones(shape)], dim=axis)

    monkeypatch.setattr("cfsp.checkpoint.stored_layout.ChannelLayout.pad", ones)
    with pytest.raises(ExportError, match="weights in the padding; nothing was kept"):
        export_checkpoint(source, "padded", tmp_path / "padded")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}


def test_bad_requests(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    with pytest.raises(UsageError, match="unknown target 'onnx'; expected one of gguf, vllm"):
        export_checkpoint(source, "onnx", tmp_path / "x")
    with pytest.raises(UsageError, match="--type belongs to gguf and openvino"):
        export_checkpoint(source, "padded", tmp_path / "x", ExportOptions("f16"))
    with pytest.raises(OutputError, match="exists and is not empty"):
        export_checkpoint(source, "padded", tmp_path / "dense")


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(padded, "write_shards", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_checkpoint(source, "padded", tmp_path / "padded")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}
