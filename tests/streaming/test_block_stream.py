"""Blocks come one by one, are read ahead once, and are then dropped.

That each computes what the model's own forward does: `ThoroughContract`, test_any_decoder.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import Checkpoint, WeightSource
from cfsp.streaming import stand_in
from cfsp.streaming.block_calls import record_calls
from cfsp.streaming.block_stream import stream_blocks
from cfsp.streaming.runtime import Runtime
from cfsp.text.windows import Windows
from tiny_models import BLOCKS, build_tiny_model

TOKENS = torch.randint(2, 320, (5, 24), generator=torch.Generator().manual_seed(0))


def outputs_of(source: WeightSource, batch: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Return what the blocks give, as they are streamed."""
    outputs: list[Tensor] = []
    runtime = Runtime(torch.device("cpu"), dtype, batch)
    for block in stream_blocks(source, Windows(TOKENS, {}), runtime):
        block.advance(lambda *rows: None, lambda before, after: outputs.append(after.clone()))
    return outputs


def test_blocks_compute_in_the_dtype_asked_for(tiny_checkpoint):
    outputs = outputs_of(Checkpoint(tiny_checkpoint("llama")), None, torch.bfloat16)
    assert {output.dtype for output in outputs} == {torch.bfloat16}


def test_one_block_at_a_time_has_weights(tiny_checkpoint):
    """What makes a model larger than memory possible."""
    modules: list[nn.Module] = []
    source = Checkpoint(tiny_checkpoint("llama"))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    for block in stream_blocks(source, Windows(TOKENS, {}), runtime):
        assert not any(p.is_meta for p in block.module.parameters())
        assert all(p.is_meta for module in modules for p in module.parameters())
        block.advance(lambda *rows: None, lambda before, after: None)
        modules.append(block.module)
    assert len(modules) == BLOCKS
    assert all(p.is_meta for module in modules for p in module.parameters())


def test_a_block_is_read_while_stand_ins_are_in_its_place(tiny_checkpoint, monkeypatch):
    """The thread that reads ahead begins before the decoder has shown how it calls its blocks."""
    standing, read = threading.Event(), threading.Event()
    submit, forward = ThreadPoolExecutor.submit, stand_in.StandIn.forward

    def late(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
        def when_they_stand(*args: Any) -> Any:
            standing.wait(60)
            try:
                return function(*args)
            finally:
                read.set()

        return submit(pool, when_they_stand, *args)

    def waiting(probe: Any, *args: Any, **kwargs: Any) -> Any:
        standing.set()
        read.wait(60)
        return forward(probe, *args, **kwargs)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", late)
    monkeypatch.setattr(stand_in.StandIn, "forward", waiting)
    outputs = outputs_of(Checkpoint(tiny_checkpoint("llama")), None, torch.float32)
    assert len(outputs) == BLOCKS


def test_each_tensor_of_a_block_is_read_once(tiny_checkpoint, noted):
    source = Checkpoint(tiny_checkpoint("qwen2"))
    reads = noted(Checkpoint, "read", lambda _, name: name)
    outputs_of(source, 2, torch.float32)
    assert len(reads) == len(set(reads))
    # The head plays no part in calibration.
    assert "lm_head.weight" not in reads


def test_one_block_is_read_ahead_and_what_reading_raises_is_raised(tiny_checkpoint, monkeypatch):
    begun: list[str] = []
    read_of: list[list[weakref.ref[torch.Tensor]]] = []
    read = stream_blocks.__globals__["read_tensors"]

    def failing(module: nn.Module, prefix: str, *more: Any) -> Any:
        begun.append(prefix)
        tensors = read(module, prefix, *more) if len(begun) < BLOCKS else 1 // 0
        read_of.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    monkeypatch.setitem(stream_blocks.__globals__, "read_tensors", failing)
    source = Checkpoint(tiny_checkpoint("llama"))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    with pytest.raises(ZeroDivisionError):
        for block in stream_blocks(source, Windows(TOKENS, {}), runtime):
            assert block.index < BLOCKS - 1
            block.advance()
            assert len(begun) <= block.index + 2
            # Of blocks that are passed nothing is held.
            assert not any(ref() is not None for of in read_of[: block.index] for ref in of)
    assert begun == [f"model.layers.{index}." for index in range(BLOCKS)]


# The recorder.


def test_recorder_notes_the_calls_and_puts_the_blocks_back():
    model = build_tiny_model("qwen2")
    blocks = model.model.layers
    originals = list(blocks)
    with torch.inference_mode():
        calls, entering_BTD = record_calls(model.model, blocks, TOKENS)
    assert list(blocks) == originals
    torch.testing.assert_close(entering_BTD, model.model.embed_tokens(TOKENS))
    given = [call.arguments[1] for call in calls]
    assert all("position_embeddings" in each for each in given)
    # qwen2's last block slides; full and sliding blocks must not share a mask.
    masks = [each["attention_mask"] for each in given]
    assert len(masks) == BLOCKS
    assert masks[0] is masks[1] is not masks[2]
    with pytest.raises(IndexError):
        record_calls(model.model, blocks, torch.tensor([[1000]]))
    assert list(blocks) == originals
