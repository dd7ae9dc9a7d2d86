"""Tiny checkpoints whose blocks differ in width, cut by a plan made by hand."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from builders import plan_keeping
from cfsp.architecture.found import Unit
from cfsp.checkpoint.own_files import copy_travelling_files
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.tensor_file import write_shards
from cfsp.cut.surgery import PrunedSource
from cfsp.planning.candidate import Dropped
from tiny_models import build_tiny_model as tiny

__all__ = ["tiny"]
WIDTHS = (64, 32, 96)
# How positions of tiny models may be scaled.
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def cut(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    widths: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> Checkpoint:
    """Return a checkpoint of the model with these widths, made in a directory.

    Args:
        model: of three blocks.
        tokenizer: its own.
        directory: for the dense and the pruned model.
        widths: of every FFN unit; None for `WIDTHS` of units of 96 channels, and for others in
            the same proportion.
        groups: KV groups of every attention, 0 where it goes; None if attention layers stay.
    """
    dense = directory / "dense"
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    source = Checkpoint(dense, parts=("ffn",) if groups is None else ("ffn", "kv", "attention"))
    if widths is None:
        ffns = source.architecture.of_part("ffn").units
        widths = [WIDTHS[u.block] * u.width // max(WIDTHS) // 8 * 8 for u in ffns]
    if groups is not None:  # in a block the attention comes first
        widths = [width for pair in zip(groups, widths, strict=True) for width in pair]
    return _cut(source, widths, directory / "pruned", Dropped())


def half_of(source: Checkpoint, out: Path, blocks: int = 6) -> Checkpoint:
    """Return the first blocks of a model with a half or a third of their channels, whichever."""
    widths = [unit.width // (2 + unit.block % 2) for unit in source.units]
    others = tuple(range(blocks, source.architecture.block_count))
    return _cut(source, widths, out, Dropped(others))


def _cut(source: Checkpoint, widths: Sequence[int], out: Path, dropped: Dropped) -> Checkpoint:
    kept_U = [
        _chosen(unit, kept, random.Random(i))
        for i, (unit, kept) in enumerate(zip(source.units, widths, strict=True))
    ]
    plan = plan_keeping(source, kept_U, dropped)
    out.mkdir()
    pruned = PrunedSource(source, plan)
    write_shards(out, pruned.outgoing())
    pruned.changes.write(source, out)
    copy_travelling_files(source.directory, out)
    return Checkpoint(out)


def _chosen(unit: Unit, kept: int, chance: random.Random) -> tuple[int, ...]:
    """Return channels at random, as many in each expert."""
    return tuple(
        ffn * unit.width + channel
        for ffn in range(unit.ffns)
        for channel in sorted(chance.sample(range(unit.width), kept))
    )


def gguf_fields_of(path: Path) -> dict[str, Any]:
    """Return what a .gguf file says besides its tensors."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
