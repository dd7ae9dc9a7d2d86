"""Blocks come one by one, are read ahead once and are then dropped; any decoder is streamed."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.errors import UnsupportedModelError
from cfsp.streaming import stand_in
from cfsp.streaming.block_calls import BlockCalls
from cfsp.streaming.block_stream import StreamedBlock, stream_blocks
from cfsp.streaming.decoder_end import Head, end_of, parameters_of_end
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.runtime import Runtime
from cfsp.text.windows import Windows
from tiny_decoders import REPRESENTATIVES, tiny_model
from tiny_models import BLOCKS, build_tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 290, (3, 12), generator=torch.Generator().manual_seed(0))


def streamed(source: WeightSource, batch: int | None = None) -> Iterator[StreamedBlock]:
    runtime = Runtime(CPU, torch.float32, batch)
    return stream_blocks(source, Windows(TOKENS, {"text": len(TOKENS)}), runtime)


def outputs_of(source: WeightSource, batch: int | None = None) -> list[Tensor]:
    """Return what the blocks give, as they are streamed."""
    outputs: list[Tensor] = []
    for block in streamed(source, batch):
        block.advance(lambda *rows: None, lambda before, after: outputs.append(after.clone()))
    return outputs


def test_one_block_at_a_time_has_weights(source):
    """What makes a model larger than memory possible."""
    modules: list[nn.Module] = []
    for block in streamed(source):
        assert not any(p.is_meta for p in block.module.parameters())
        assert all(p.is_meta for module in modules for p in module.parameters())
        block.advance(lambda *rows: None, lambda before, after: None)
        modules.append(block.module)
    assert len(modules) == BLOCKS
    assert all(p.is_meta for module in modules for p in module.parameters())


def test_a_block_is_read_while_stand_ins_are_in_its_place(source, monkeypatch):
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
    assert len(outputs_of(source)) == BLOCKS


def test_each_tensor_of_a_block_is_read_once(tiny_checkpoint, noted):
    source = Checkpoint(tiny_checkpoint("qwen2"))
    reads = noted(Checkpoint, "read", lambda _, name: name)
    outputs_of(source, 2)
    assert len(reads) == len(set(reads))
    # The head plays no part in calibration.
    assert "lm_head.weight" not in reads


def test_one_block_is_read_ahead_and_what_reading_raises_is_raised(source, monkeypatch):
    begun: list[str] = []
    read_of: list[list[weakref.ref[torch.Tensor]]] = []
    read = stream_blocks.__globals__["read_tensors"]

    def failing(module: nn.Module, prefix: str, *more: Any) -> Any:
        begun.append(prefix)
        tensors = read(module, prefix, *more) if len(begun) < BLOCKS else 1 // 0
        read_of.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    monkeypatch.setitem(stream_blocks.__globals__, "read_tensors", failing)
    with pytest.raises(ZeroDivisionError):
        for block in streamed(source):
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
        calls = BlockCalls(model.model, blocks, TOKENS, CPU)
        entering_BTD = calls.learn(range(len(TOKENS)))
    assert list(blocks) == originals
    torch.testing.assert_close(entering_BTD, model.model.embed_tokens(TOKENS))
    given = [calls.of(index, len(TOKENS)).arguments[1] for index in range(BLOCKS)]
    assert all("position_embeddings" in each for each in given)
    # qwen2's last block slides; full and sliding blocks must not share a mask.
    masks = [each["attention_mask"] for each in given]
    assert len(masks) == BLOCKS
    assert masks[0] is masks[1] is not masks[2]
    with pytest.raises(IndexError):
        BlockCalls(model.model, blocks, torch.tensor([[1000]]), CPU)
    assert list(blocks) == originals


# Any decoder: streamed block by block it is what the model computes, too.


SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}

# Of these all but the decoder goes before they are streamed.
MULTIMODAL = ("gemma3", "qwen2_5_vl", "llama4", "mistral3", "smolvlm")
# Besides: several streams, values made from the text, more than one value between blocks.
STREAMED = (
    *(name for name in REPRESENTATIVES if name not in MULTIMODAL),
    "gemma3n_text", "deepseek_v4", "zaya", "hy_v4", "gpt_neo", "bamba",
)  # fmt: skip


def parts_of(model: nn.Module) -> tuple[Architecture, nn.Module, nn.ModuleList]:
    architecture = find_architecture(model)
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return architecture, model.get_submodule(architecture.decoder), blocks


def started(model: nn.Module, tokens_NT: Tensor, size: int = 3) -> tuple[HiddenStates, BlockCalls]:
    """Return what enters the blocks, and how they are called with so many windows at a time."""
    _, decoder, blocks = parts_of(model)
    batches = [slice(i, min(i + size, len(tokens_NT))) for i in range(0, len(tokens_NT), size)]
    calls = BlockCalls(decoder, blocks, tokens_NT, CPU)
    return calls.embed(batches, lambda shape: HiddenStates(shape, torch.float32)), calls


def streamed_logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Return the logits of all tokens, with one block after the other, two windows at a time."""
    _, _, blocks = parts_of(model)
    hidden, calls = started(model, tokens_NT, 2)
    for index, block in enumerate(blocks):
        for first in range(0, len(tokens_NT), 2):
            windows = range(len(tokens_NT))[first : first + 2]
            batch = slice(windows.start, windows.stop)
            hidden.write(batch, calls.compute(index, block, windows, hidden.read(batch)))
    hidden_PD = hidden.read(slice(0, len(tokens_NT))).flatten(0, 1)
    logits_PV = Head(LoadedModel(model), CPU, torch.float32).logits(hidden_PD)
    return logits_PV.unflatten(0, tuple(tokens_NT.shape))


def own_logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Return the logits of the model's own forward; of the part that has the head."""
    end = model.get_submodule(end_of(model, find_architecture(model).decoder))
    return end(input_ids=tokens_NT, use_cache=False).logits


@torch.inference_mode()
def check_streamed(model: nn.Module) -> None:
    want = own_logits(model, TOKENS)
    torch.testing.assert_close(streamed_logits(model, TOKENS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", STREAMED)
def test_streamed_is_what_the_model_computes(model_type):
    check_streamed(tiny_model(model_type))


def test_keys_and_values_that_blocks_share_pass_with_the_windows():
    model = tiny_model("gemma4_text", **SHARED_KEYS)
    shares = [block.self_attn.is_kv_shared_layer for block in model.model.layers]
    assert shares == [False, False, True, True]
    check_streamed(model)


@torch.inference_mode()
@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_only_the_decoder_of_a_multimodal_model_is_read(model_type):
    model = tiny_model(model_type)
    architecture, _, _ = parts_of(model)
    want = own_logits(model, TOKENS)
    kept = set(parameters_of_end(model, architecture.decoder, architecture.blocks))
    assert not any("vision" in name or "visual" in name for name in kept)
    assert any("lm_head" in name for name in kept)
    names = [name for name, _ in model.named_parameters() if "lm_head" not in name]
    beside = [name for name in names if not name.startswith(f"{architecture.decoder}.")]
    assert any("vision" in name or "visual" in name for name in beside)
    for name in beside:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        weightless = nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False)
        setattr(module, leaf, weightless)
    torch.testing.assert_close(streamed_logits(model, TOKENS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma4", "gemma3n_text", "cohere2", "opt"])
def test_a_head_of_its_own_is_all_that_is_read_of_the_end(model_type):
    model = tiny_model(model_type, tie_word_embeddings=False)
    architecture, _, _ = parts_of(model)
    kept = set(parameters_of_end(model, architecture.decoder, architecture.blocks))
    assert not any(name.startswith(f"{architecture.blocks}.") for name in kept)
    check_streamed(model)


@torch.inference_mode()
def test_what_blocks_leave_for_later_ones_is_told():
    for overrides, leaves in (({}, False), (SHARED_KEYS, True)):
        model = tiny_model("gemma4_text", **overrides)
        hidden, calls = started(model, TOKENS)
        calls.compute(0, model.model.layers[0], range(3), hidden.read(slice(0, 3)))
        assert calls.carry(0) == leaves
        # A call of any windows is refused where windows differ.
        with pytest.raises(UnsupportedModelError, match="of block 0 differs from window to window"):
            calls.of(0, 3)
    # What a block returns beside the hidden state goes to the next.
    model = tiny_model("zaya")
    _, calls = started(model, TOKENS)
    assert [calls.carry(index) for index in range(3)] == [True, True, False]


# Models whose blocks cannot be streamed, although each is called once (test_proof.py).


class Layer(nn.Linear):
    def forward(self, hidden: Tensor, more: Tensor | float = 0.0) -> Tensor:
        return super().forward(hidden) + more


class Decoder(nn.Module):
    """Embeddings, three blocks that hidden states pass in some way, and nothing after them."""

    def __init__(self, through: Callable[[Tensor, nn.ModuleList], Tensor]) -> None:
        super().__init__()
        self.embed, self.through = nn.Embedding(320, 8), through
        self.layers = nn.ModuleList(Layer(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        return (self.through(self.embed(input_ids), self.layers),)


def passed(hidden: Tensor, layers: Iterable[Any]) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def each(call: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Let hidden states pass every layer by a call of it."""
    return lambda hidden, layers: passed(hidden, [partial(call, layer) for layer in layers])


def summed(hidden: Tensor, layers: nn.ModuleList) -> Tensor:
    states = list(accumulate(layers, lambda before, layer: layer(before), initial=hidden))
    return torch.stack(states).sum(0)


@pytest.mark.parametrize(
    ("through", "words"),
    [
        (summed, r"what comes after the last block \(Layer\) needs more"),
        (each(lambda layer, x: layer(x, x.mean())), r"argument 0 of block 1 \(Layer\) is made"),
        (each(lambda layer, x: layer(x)["h"]), "Layer cannot be run by itself"),
    ],
    ids=["summing", "feeding", "unpacking"],
)
def test_what_cannot_be_streamed_is_refused(through, words):
    decoder = Decoder(through)
    with pytest.raises(UnsupportedModelError, match=words):
        BlockCalls(decoder, decoder.layers, TOKENS, CPU)
