"""Exports of decoders of any type: padded takes them all, the others say what they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from cfsp.checkpoint.config_widths import config_with_widths, padded_widths
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.errors import ExportError
from cfsp.exports.registry import export_checkpoint
from tiny_decoders import tiny_config

TYPES = (
    "qwen3_next", "deepseek_v3", "nemotron_h", "llama4_text", "granitemoehybrid", "jamba", "lfm2",
    "gpt_oss", "falcon", "gemma4_text", "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_padded_is_the_stock_class(
    name: str, pruned_type: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = Checkpoint(pruned_type(name)), tmp_path / "padded"
    report = export_checkpoint(source, "padded", out)
    assert report.verification is not None
    config = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "ffn_widths"} & config.keys()
    (class_name,) = config["architectures"]
    _, info = getattr(transformers, class_name).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    # A kind of FFN that has a number of its own in the config is no wider than its widest.
    widest: dict[str, int] = {}
    for unit in source.units:
        widest[unit.path] = max(unit.width, widest.get(unit.path, 0))
    padded = Checkpoint(out).units
    alone = {"mlp.experts", "mlp.shared_expert", "mixer.experts"}
    for unit in padded:
        assert unit.width >= widest[unit.path]
        if unit.path in alone:
            assert unit.width == widest[unit.path], unit.path


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        # Dense FFNs have a number; experts and shared experts have one together.
        ("deepseek_v3", [80, 40, 32, 48, 32], [80, 48, 48, 48, 48]),
        # The shared expert is as wide as several experts.
        ("glm4_moe", [80, 40, 32, 48, 32], [80, 48, 48, 48, 48]),
        ("qwen3_next", [40, 56, 32, 88, 24, 80], [40, 88, 40, 88, 40, 88]),
    ],
)
def test_each_kind_is_padded_to_its_own_widest(
    name: str, given: list[int], expected: list[int]
) -> None:
    config = tiny_config(name)
    pruned = config_with_widths(config, architecture_of(config), given)
    assert padded_widths(pruned, architecture_of(pruned)) == expected


def test_what_no_key_gives_is_as_wide_as_before() -> None:
    # A width for each block, in a list, of which no single number is the key.
    config = tiny_config("gemma3n_text")
    architecture = architecture_of(config)
    dense = architecture.widths
    pruned = config_with_widths(config, architecture, [width - 8 for width in dense])
    assert padded_widths(pruned, architecture_of(pruned)) == dense


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("nemotron_h", "gguf", "export of nemotron_h models is not supported.*a stock one"),
        ("falcon", "vllm", "cannot express falcon; use --to padded"),
        ("gpt_oss", "openvino", "export of gpt_oss models is not supported.*--to padded"),
        ("gemma3", "openvino", "export of gemma3 models is not supported.*images too.*--to padded"),
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
