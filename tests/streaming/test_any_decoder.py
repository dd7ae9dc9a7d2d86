"""Any decoder: streamed block by block = the model's own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from any_models import REPRESENTATIVES
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.decoder_end import DecoderEnd, end_of, parameters_of_end
from cfsp.streaming.decoder_start import DecoderStart
from cfsp.streaming.hidden_states import HiddenInMemory
from tiny_decoders import tiny_model

SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
CPU = torch.device("cpu")
TOKENS = torch.randint(2, 290, (3, 12), generator=torch.Generator().manual_seed(0))

# Besides: several streams, values made from the text, more than one value between blocks.
STREAMED = (*REPRESENTATIVES, "gemma3n_text", "deepseek_v4", "zaya", "hy_v4", "gpt_neo", "bamba")


def parts_of(model: nn.Module) -> tuple[Architecture, nn.Module, nn.ModuleList]:
    architecture = find_architecture(model)
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return architecture, model.get_submodule(architecture.decoder), blocks


def streamed_logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Return the logits of all tokens, with one block after the other, two windows at a time."""
    architecture, decoder, blocks = parts_of(model)
    batches = [slice(i, min(i + 2, len(tokens_NT))) for i in range(0, len(tokens_NT), 2)]
    hidden, calls = DecoderStart(decoder, blocks, CPU).embed(
        tokens_NT, batches, lambda shape: HiddenInMemory(shape, torch.float32)
    )
    for index, block in enumerate(blocks):
        for batch in batches:
            windows = range(batch.start, batch.stop)
            hidden.write(batch, calls.compute(index, block, windows, hidden.read(batch)))
        hidden.swap_buffers()
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


@torch.inference_mode()
def test_keys_and_values_that_blocks_share_pass_with_the_windows() -> None:
    model = tiny_model("gemma4_text", **SHARED_KEYS)
    assert [block.self_attn.is_kv_shared_layer for block in model.model.layers] == [
        False, False, True, True,
    ]  # fmt: skip
    want = own_logits(model, TOKENS)
    torch.testing.assert_close(streamed_logits(model, TOKENS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "llama4", "mistral3", "smolvlm"])
def test_only_the_decoder_of_a_multimodal_model_is_read(model_type: str) -> None:
    model = tiny_model(model_type)
    architecture, _, _ = parts_of(model)
    with torch.inference_mode():
        want = own_logits(model, TOKENS)
    kept = set(parameters_of_end(model, architecture.decoder, architecture.blocks))
    assert not any("vision" in name or "visual" in name for name in kept)
    assert any("lm_head" in name for name in kept)
    on_meta = set()
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(f"{architecture.decoder}.") and "lm_head" not in name:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))
            on_meta.add(name)
    assert any("vision" in name or "visual" in name for name in on_meta)
    with torch.inference_mode():
        torch.testing.assert_close(streamed_logits(model, TOKENS), want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("model_type", ["llama", "gemma4", "gemma3n_text", "cohere2", "opt"])
def test_the_end_needs_no_more_than_its_parameters(model_type: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=False)
    architecture, _, _ = parts_of(model)
    end = DecoderEnd(model, architecture.decoder, architecture.blocks, CPU)
    hidden_PD = torch.randn(5, 4 * 32 if model_type == "gemma3n_text" else 32)
    want = end.logits(hidden_PD)
    kept = set(parameters_of_end(model, architecture.decoder, architecture.blocks))
    assert not any(name.startswith(f"{architecture.blocks}.") for name in kept)
    for name, parameter in list(model.named_parameters()):
        if name not in kept:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))
    bare = DecoderEnd(model, architecture.decoder, architecture.blocks, CPU)
    assert torch.equal(bare.logits(hidden_PD), want)


@torch.inference_mode()
def test_what_blocks_leave_for_later_ones_is_told() -> None:
    for overrides, leaves in (({}, False), (SHARED_KEYS, True)):
        model = tiny_model("gemma4_text", **overrides)
        _, decoder, blocks = parts_of(model)
        hidden, calls = DecoderStart(decoder, blocks, CPU).embed(
            TOKENS, [slice(0, 3)], lambda shape: HiddenInMemory(shape, torch.float32)
        )
        calls.compute(0, blocks[0], range(3), hidden.read(slice(0, 3)))
        assert calls.carry(0) == leaves
    # What a block returns beside the hidden state goes to the next.
    model = tiny_model("zaya")
    _, decoder, blocks = parts_of(model)
    start = DecoderStart(decoder, blocks, CPU)
    _, calls = start.embed(
        TOKENS, [slice(0, 3)], lambda shape: HiddenInMemory(shape, torch.float32)
    )
    assert [calls.carry(index) for index in range(len(blocks))] == [True, True, False]


def test_a_call_of_any_windows_is_refused_where_windows_differ() -> None:
    model = tiny_model("gemma4_text")
    _, decoder, blocks = parts_of(model)
    with torch.inference_mode():
        _, calls = DecoderStart(decoder, blocks, CPU).embed(
            TOKENS, [slice(0, 3)], lambda shape: HiddenInMemory(shape, torch.float32)
        )
    with pytest.raises(UnsupportedModelError, match="of block 0 differs from window to window"):
        calls.of(0, 3)


# Models whose blocks cannot be streamed.


class Decoder(nn.Module):
    """Embeddings, three linear blocks, and nothing after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(320, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        return (self.blocks(self.embed(input_ids)),)

    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Looping(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        return super().blocks(super().blocks(hidden))


class Skipping(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        return self.layers[2](self.layers[0](hidden))


class Scaling(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden * 2)
        return hidden


class Summing(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        total = hidden
        for layer in self.layers:
            hidden = layer(hidden)
            total = total + hidden
        return total


class Block(nn.Module):
    def forward(self, hidden: Tensor, more: Tensor) -> Tensor:
        return hidden + more


class Feeding(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, hidden.mean())
        return hidden


class Flat(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        return super().blocks(hidden.flatten(0, 1)).view_as(hidden)


class Unpacking(Decoder):
    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)["states"]
        return hidden


@pytest.mark.parametrize(
    ("decoder_class", "words"),
    [
        (Looping, r"in the order 0, 1, 2, 0, 1, 2, not each once"),
        (Skipping, r"in the order 0, 2, not each once"),
        (Scaling, r"changes the hidden states between blocks 0 and 1"),
        (Summing, r"what comes after the last block \(Linear\) needs more"),
        (Feeding, r"argument 0 of block 1 \(Block\) is made from hidden states"),
        (Flat, r"given hidden states of shape \[6, 8\]"),
        (Unpacking, r"Linear cannot be run by itself"),
    ],
)
def test_what_cannot_be_streamed_is_refused(decoder_class: type[Decoder], words: str) -> None:
    decoder = decoder_class()
    with pytest.raises(UnsupportedModelError, match=words):
        _ = DecoderStart(decoder, decoder.layers, CPU).form


def test_a_decoder_that_cannot_begin_with_tokens_is_refused() -> None:
    decoder = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnsupportedModelError, match="Sequential, which calls the blocks, takes no"):
        _ = DecoderStart(decoder, nn.ModuleList(decoder), CPU).form
