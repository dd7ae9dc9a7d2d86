"""The engine on any decoder: streamed block by block = the model's own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from any_models import tiny_model
from cfsp.architecture.discovery import find_architecture
from cfsp.engine.decoder_end import DecoderEnd, end_of
from cfsp.engine.decoder_start import DecoderStart
from cfsp.engine.hidden_states import HiddenInMemory

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 290, (3, 12), generator=torch.Generator().manual_seed(0))

STREAMED = (
    "llama", "gemma3", "gemma4_text", "qwen3_5_text", "qwen3_next", "gpt_oss", "deepseek_v3",
    "glm4_moe", "llama4_text", "nemotron_h", "granitemoehybrid", "jamba", "lfm2", "falcon",
    "bloom", "mpt", "gpt2", "opt", "mixtral", "qwen2_5_vl", "gemma3n_text", "deepseek_v4",
)  # fmt: skip


def streamed_logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Return the logits of all tokens, with one block after the other, two windows at a time."""
    architecture = find_architecture(model)
    decoder = model.get_submodule(architecture.decoder)
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    batches = [slice(i, min(i + 2, len(tokens_NT))) for i in range(0, len(tokens_NT), 2)]
    hidden, calls = DecoderStart(decoder, blocks, CPU).embed(
        tokens_NT, batches, lambda shape: HiddenInMemory(shape, torch.float32)
    )
    for index, block in enumerate(blocks):
        for batch in batches:
            windows = range(batch.start, batch.stop)
            hidden.write(batch, calls.compute(index, block, windows, hidden.read(batch)))
        hidden.turn()
    end = DecoderEnd(model, architecture.decoder, architecture.blocks, CPU)
    hidden_PD = hidden.read(slice(0, len(tokens_NT))).flatten(0, 1)
    return end.logits(hidden_PD).unflatten(0, tuple(tokens_NT.shape))


def own_logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Return the logits of the model's own forward; of the part that has the head."""
    end = model.get_submodule(end_of(model, find_architecture(model).decoder))
    return end(input_ids=tokens_NT, use_cache=False).logits


@pytest.mark.parametrize("model_type", STREAMED)
def test_streamed_is_what_the_model_computes(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.inference_mode():
        torch.testing.assert_close(
            streamed_logits(model, TOKENS), own_logits(model, TOKENS), rtol=1e-5, atol=1e-5
        )
