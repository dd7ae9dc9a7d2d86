"""Target `padded`: the plain stock class, every FFN zero-padded to the widest of its kind.

For software that neither reads `per_layer_config` nor runs remote code. Added channels are
zero in all three matrices: act(0) * 0 is 0, and the down projection ignores it. Nothing is
saved: the copy is as large and as slow as its widest block everywhere. Dense FFNs, shared experts
and routed experts are each padded to their own widest, as far as the stock config has a number
for each of them. Tensors stream from shard to shard; one is in memory at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.config_widths import fields_with_widths, padded_widths
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
    widths, padded = source.architecture.widths, padded_widths(source.config, source.architecture)
    outgoing = [_outgoing(source, name, spec, padded) for name, spec in source.specs.items()]
    write_shards(out, outgoing)
    (out / "config.json").write_text(stock_config_json(source, padded), encoding="utf-8")
    copy_travelling_files(source.directory, out)
    # Channels as everywhere: those of one expert stand for all of its block.
    wide = sum(padded)
    padding = wide - sum(widths)
    layout = f"{source.architecture.class_name}, {_in_words(source, padded)}"
    if not padding:
        return Written(layout, ("all blocks are equally wide: nothing was padded",))
    return Written(
        layout,
        (
            f"{padding:,} of {wide:,} channels are zeros: it runs everywhere, "
            "but saves no memory and no time over the widest block",
        ),
    )


def stock_config_json(source: Checkpoint, widths: Sequence[int]) -> str:
    """Return config.json of the stock class with widths that it can build."""
    fields = read_plain_fields(source.directory)
    config = fields_with_widths(fields, source.config, source.architecture, widths)
    assert "auto_map" not in config, widths
    return json.dumps(config, indent=2) + "\n"


def _in_words(source: Checkpoint, widths: Sequence[int]) -> str:
    """Return how many FFNs there are of each width."""
    units = source.units
    if [unit.block for unit in units] == list(range(len(units))) and len(set(widths)) == 1:
        return f"{len(units)} blocks of {widths[0]} channels"
    count: Counter[tuple[str, int]] = Counter()
    for unit, width in zip(units, widths, strict=True):
        count[unit.path, width] += unit.ffns
    return ", ".join(f"{number} {path} of {width}" for (path, width), number in count.items())


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
    if layout is None or layout.width(spec.shape) == widths[layout.unit]:
        return OutgoingTensor(name, spec, lambda: source.chunks(name))
    width = widths[layout.unit]

    def padded() -> Iterator[memoryview]:
        return tensor_chunks(layout.pad(source.read(name), width))

    return OutgoingTensor(name, layout.resized(spec, width), padded)


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
