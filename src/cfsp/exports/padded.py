"""Target `padded`: the plain stock class, FFNs zero-padded to the width of the widest of a kind.

For software that neither reads `per_layer_config` nor runs remote code. Added channels are
zero in all three matrices: act(0) * 0 is 0, and the down projection ignores it. Nothing is
saved: the copy is as large and as slow as its widest block everywhere. Tensors stream from
shard to shard; one is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.config_widths import fields_with_widths, stock_config
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.shards import write_shards
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.checkpoint.tensor_file import OutgoingTensor, TensorSpec, tensor_chunks
from cfsp.checkpoint.writing import copy_travelling_files
from cfsp.errors import ExportError
from cfsp.exports.target import ExportOptions, Target, Written
from cfsp.exports.verification import (
    Verification,
    compare_logits,
    logits_of,
    probe_tokens,
    reference_model,
)

# A longer sum is added up in another order, so logits differ by rounding: float32 has 2^-24.
TOLERANCE = 1e-5


def write(source: Checkpoint, out: Path, options: ExportOptions) -> Written:
    """Write the padded checkpoint into an existing directory."""
    widths = source.architecture.widths
    fields = read_plain_fields(source.directory)
    padded, config = _stock_widths(source, fields)
    outgoing = [_outgoing(source, name, spec, padded) for name, spec in source.specs.items()]
    write_shards(out, outgoing)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_travelling_files(source.directory, out)
    padding = sum(padded) - sum(widths)
    sizes = " and ".join(str(width) for width in sorted(set(padded)))
    layout = f"{source.architecture.class_name}, {len(padded)} FFNs of {sizes} channels"
    if not padding:
        return Written(layout, ("all blocks are equally wide: nothing was padded",))
    return Written(
        layout,
        (
            f"{padding:,} of {sum(padded):,} channels are zeros: it runs everywhere, "
            "but saves no memory and no time over the widest block",
        ),
    )


def _stock_widths(source: Checkpoint, fields: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Return widths that the stock class can build, and config.json with them.

    They are those of the widest FFN at each path, or where no key of the config says these, those
    of the stock model that the checkpoint was pruned from.
    """
    units, architecture = source.units, source.architecture
    widest: dict[str, int] = {}
    for unit in units:
        widest[unit.path] = max(unit.width, widest.get(unit.path, 0))
    padded = [widest[unit.path] for unit in units]
    config = fields_with_widths(fields, source.config, architecture, padded)
    if "auto_map" in config:
        padded = architecture_of(stock_config(source.config)).widths
        config = fields_with_widths(fields, source.config, architecture, padded)
    return padded, config


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare every weight bit by bit, and the logits of the reloaded model."""
    padded = Checkpoint(out)
    for name in source.specs:
        _check_tensor(source, name, padded.read(name))
    tokens = probe_tokens(source)
    expected_TV = logits_of(reference_model(source), tokens)
    found_TV = logits_of(reference_model(padded), tokens)
    return compare_logits("transformers", expected_TV, found_TV, TOLERANCE)


def _outgoing(
    source: Checkpoint, name: str, spec: TensorSpec, widths: Sequence[int]
) -> OutgoingTensor:
    layout = source.layout_of(name)
    widest = 0 if layout is None else widths[layout.unit]
    if layout is None or layout.width(spec.shape) == widest:
        return OutgoingTensor(name, spec, lambda: source.chunks(name))

    def padded() -> Iterator[memoryview]:
        return tensor_chunks(layout.pad(source.read(name), widest))

    return OutgoingTensor(name, layout.resized(spec, widest), padded)


def _check_tensor(source: Checkpoint, name: str, found: Tensor) -> None:
    expected = source.read(name)
    layout = source.layout_of(name)
    if layout is not None:
        width = layout.width(expected.shape)
        ffns = source.units[layout.unit].ffns
        padding = range(width, layout.width(found.shape))
        if padding and bool(layout.select(found, [padding] * ffns).any()):
            raise ExportError(f"{name} has weights in the padding; nothing was kept")
        found = layout.select(found, [range(width)] * ffns)
    if not torch.equal(found, expected):
        raise ExportError(f"{name} differs from the checkpoint's; nothing was kept")


TARGET = Target("padded", "", write, verify)
