"""Calibration: one forward pass over the windows, giving Statistics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.accumulators import ChannelSums, DistanceSums
from cfsp.calibration.block_stream import StreamedBlock, stream_blocks
from cfsp.calibration.statistics import BlockStatistics, CalibrationRecord, Statistics
from cfsp.checkpoint.reading import fingerprint
from cfsp.errors import CalibrationError
from cfsp.progress import token_progress

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.text.windows import Windows


def calibrate(
    source: WeightSource,
    windows: Windows,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    batch_windows: int | None = None,
) -> Statistics:
    """Run all windows through the model once, block by block, and gather statistics.

    Args:
        source: the model.
        windows: the calibration text.
        device: where blocks compute.
        dtype: what they compute in.
        seed: the seed that the windows were drawn by, for the record.
        batch_windows: windows that pass together; None for about 4096 tokens.

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        CheckpointError: a tensor is missing or truncated.
    """
    record = calibration_record(source, windows, device=device, dtype=dtype, seed=seed)
    check_vocabulary_size(source.config.vocab_size, windows.tokens_NT, source.label)
    blocks = []
    passes = windows.tokens_NT.numel() * source.config.num_hidden_layers
    with token_progress("calibrate", source.config.num_hidden_layers, passes) as progress:
        for block in stream_blocks(
            source,
            windows.tokens_NT,
            device=device,
            dtype=dtype,
            batch_windows=batch_windows,
            on_batch=progress.tokens,
        ):
            blocks.append(observe(block))
            progress.block_done()
    return Statistics(tuple(blocks), record)


def calibration_record(
    source: WeightSource, windows: Windows, *, device: torch.device, dtype: torch.dtype, seed: int
) -> CalibrationRecord:
    """Return the conditions of a calibration, for its statistics and plans."""
    return CalibrationRecord(
        model=source.label,
        fingerprint=fingerprint(source),
        sources=windows.sources,
        tokens_digest=windows.digest,
        windows=windows.tokens_NT.shape[0],
        seqlen=windows.tokens_NT.shape[1],
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
    )


def observe(block: StreamedBlock) -> BlockStatistics:
    """Let the windows pass one block and return its statistics.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    distances, channels = DistanceSums(), ChannelSums()
    block.advance(channels.add, distances.add)
    return statistics_of(block.index, distances, channels)


def statistics_of(index: int, distances: DistanceSums, channels: ChannelSums) -> BlockStatistics:
    """Return what the sums of one block amount to.

    Raises:
        CalibrationError: an activation was NaN or infinite.
    """
    assert channels.sum_F is not None
    assert channels.sum_of_squares_F is not None
    if not all(map(math.isfinite, distances.sums.values())) or not bool(
        torch.isfinite(channels.sum_of_squares_F).all()
    ):
        raise CalibrationError(
            f"block {index} produced NaN or infinite activations; "
            "calibrate with --dtype float32 or bfloat16"
        )
    return BlockStatistics(
        dict(distances.sums),
        channels.sum_F.cpu(),
        channels.sum_of_squares_F.cpu(),
        channels.tokens,
    )


def check_vocabulary_size(size: int, tokens_NT: Tensor, label: str) -> None:
    """Check that every token id has an embedding.

    Raises:
        CalibrationError: the tokenizer belongs to another model.
    """
    highest = int(tokens_NT.max())
    if highest >= size:
        raise CalibrationError(
            f"the tokenizer gives token id {highest}, but {label} has a vocabulary of "
            f"{size}; use the model's own tokenizer"
        )
