"""What a multimodal model does before and between its first blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.block_stream import stream_blocks, windows_in_batch
from cfsp.streaming.decoder_start import DecoderStart
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.runtime import Runtime
from cfsp.text.windows import Windows
from image_inputs import image_windows
from tiny_decoders import tiny_model

CPU = torch.device("cpu")


@torch.inference_mode()
def start(model_type: str, model: Any) -> tuple[Any, Any, Windows]:
    windows = image_windows(model_type, model)
    found = LoadedModel(model).architecture
    decoder, blocks = (model.get_submodule(path) for path in (found.decoder, found.blocks))
    of_images = DecoderStart(decoder, blocks, Runtime(CPU, torch.float32), model)
    batches = [slice(0, 1), slice(1, 2)]
    hidden, calls = of_images.embed(
        windows, batches, lambda shape: HiddenStates(shape, torch.float32)
    )
    return hidden, calls, windows


def test_features_of_images_are_added_between_blocks() -> None:
    """Qwen3-VL adds them to what leaves its first two blocks, where the image is."""
    model = tiny_model("qwen3_vl")
    hidden, calls, windows = start("qwen3_vl", model)
    of_image_T = windows.images_of(0)["mm_token_type_ids"][0].bool()
    for index, adds in ((0, False), (1, True), (2, True)):
        for window in (0, 1):
            before_BTD = hidden.read(slice(window, window + 1))
            moved_T = (calls.entering(index, [window], before_BTD) != before_BTD).any(-1)[0]
            assert torch.equal(moved_T, of_image_T & (adds and window == 0))


def test_what_is_no_addition_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_vl")
    decoder = type(model.model.language_model)
    monkeypatch.setattr(
        decoder, "_deepstack_process", lambda self, hidden, mask, images: hidden * 2
    )
    with pytest.raises(UnsupportedModelError, match=r"between blocks 0 and 1 .* more than an add"):
        start("qwen3_vl", model)


@pytest.mark.parametrize(
    ("model_type", "differ"), [("llava", False), ("gemma3", True), ("qwen2_5_vl", True)]
)
def test_what_differs_is_kept_for_each_window(model_type: str, differ: bool) -> None:
    """An image sees all of itself (Gemma 3), and has rows and columns (Qwen2.5-VL)."""
    _, calls, _ = start(model_type, tiny_model(model_type))
    assert calls.depend_on_text == differ
    if differ:
        with pytest.raises(UnsupportedModelError, match="differs from window to window"):
            calls.of(0, 1)
    else:
        calls.of(0, 1)


def test_windows_pass_one_at_a_time_and_only_blocks_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llava")
    windows = image_windows("llava", model)
    assert windows_in_batch(windows, 8) == windows_in_batch(windows, None) == 1
    skeletons: list[nn.Module] = []
    build = stream_blocks.__globals__["build_skeleton"]

    def noted(*args: Any) -> nn.Module:
        skeletons.append(build(*args))
        return skeletons[-1]

    monkeypatch.setitem(stream_blocks.__globals__, "build_skeleton", noted)
    for block in stream_blocks(LoadedModel(model), windows, Runtime(CPU, torch.float32)):
        filled = {name for name, p in skeletons[0].named_parameters() if not p.is_meta}
        assert filled
        assert all(f".layers.{block.index}." in name for name in filled)
        assert not any("vision" in name for name in filled)
        block.advance()
