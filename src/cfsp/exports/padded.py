"""Target `padded`: the plain stock class, every FFN zero-padded to the width of the widest.

For software that neither reads `per_layer_config` nor runs remote code. Added channels are
zero in all three matrices: act(0) * 0 is 0, and the down projection ignores it. Nothing is
saved: the copy is as large and as slow as its widest block everywhere. Tensors stream from
shard to shard; one is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.config_widths import fields_with_widths
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.shards import write_shards
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
    widest = max(widths)
    outgoing = [_outgoing(source, name, spec, widest) for name, spec in source.specs.items()]
    write_shards(out, outgoing)
    fields = read_plain_fields(source.directory)
    config = fields_with_widths(fields, source.config, source.architecture, [widest] * len(widths))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_travelling_files(source.directory, out)
    padding = widest * len(widths) - sum(widths)
    layout = f"{source.architecture.class_name}, {len(widths)} blocks of {widest} channels"
    if not padding:
        return Written(layout, ("all blocks are equally wide: nothing was padded",))
    return Written(
        layout,
        (
            f"{padding:,} of {widest * len(widths):,} channels are zeros: it runs everywhere, "
            "but saves no memory and no time over the widest block",
        ),
    )


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare every weight bit by bit, and the logits of the reloaded model."""
    padded = Checkpoint(out)
    for name in source.specs:
        _check_tensor(source, name, padded.read(name))
    tokens = probe_tokens(source)
    expected_TV = logits_of(reference_model(source), tokens)
    found_TV = logits_of(reference_model(padded), tokens)
    return compare_logits("transformers", expected_TV, found_TV, TOLERANCE)


def _outgoing(source: Checkpoint, name: str, spec: TensorSpec, widest: int) -> OutgoingTensor:
    layout = source.layout_of(name)
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
