"""Calibration on images: streamed block by block = hooks on the whole stock model.

Shapes: B windows, T tokens, D hidden, F FFN channels, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from builders import draw_windows
from cfsp.architecture.activations import hidden_state
from cfsp.calibration.calibrate import DistanceSum, calibrate
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.processes import Team
from cfsp.settings import Compute
from cfsp.streaming.block_stream import part_of
from cfsp.streaming.runtime import runtime_of
from cfsp.text.tokenizers import load_processor, load_tokenizer
from cfsp.text.windows import Windows
from image_inputs import image_windows
from image_processors import TYPES, chats_with_images, image_tokenizer, save_multimodal
from tiny_decoders import BLOCKS, tiny_model

SAMPLES, SEQLEN = 4, 96

# Llama 4's own forward asks it of what its text decoder returns, which in 5.24 does not have it.
MoeCausalLMOutputWithPast.image_outputs = None

# PaliGemma's own processor in 5.24, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@dataclass
class Case:
    """A tiny multimodal checkpoint, and windows of a mixture for it."""

    model: nn.Module
    source: WeightSource
    windows: Windows


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats_with_images(tmp_path_factory.mktemp("chats"), 24)


@pytest.fixture(scope="module", params=TYPES)
def case(request, chats, text_file, tmp_path_factory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = image_tokenizer(directory / "tokenizer")
    model = save_multimodal(request.param, tokenizer, directory / "model")
    source = Checkpoint(directory / "model")
    windows = draw_windows(
        [str(chats), str(text_file)],
        load_tokenizer(source.directory),
        samples=SAMPLES,
        seqlen=SEQLEN,
        processor=cache(lambda: load_processor(source.directory)),
    )
    return Case(model, source, windows)


@torch.inference_mode()
def whole_model_sums(case: Case) -> tuple[list[DistanceSum], dict[tuple[int, str], Tensor]]:
    """Return distances of blocks, and sums of squares of channels, by hooks."""
    architecture = case.source.architecture
    blocks = case.model.get_submodule(architecture.blocks)
    distances = [DistanceSum() for _ in blocks]
    sums: dict[tuple[int, str], Tensor] = {}
    hooks = []

    def see_block(own: DistanceSum, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        own.add(hidden_state(args, kwargs), output[0] if isinstance(output, tuple) else output)

    def see_act(key: tuple[int, str], module: nn.Module, args: Any) -> None:
        sums[key] = sums.get(key, 0) + args[0].flatten(0, -2).double().square().sum(0)

    for index, block in enumerate(blocks):
        see = partial(see_block, distances[index])
        hooks.append(block.register_forward_hook(see, with_kwargs=True))
        for unit in architecture.units_of(index):
            if not unit.routed:
                down = block.get_submodule(unit.down.removesuffix(".weight"))
                see_own = partial(see_act, (index, unit.down))
                hooks.append(down.register_forward_pre_hook(see_own))
    for window in range(len(case.windows.tokens_NT)):
        tokens_BT = case.windows.tokens_NT[window : window + 1]
        case.model(input_ids=tokens_BT, use_cache=False, **case.windows.images_of(window))
    for hook in hooks:
        hook.remove()
    return distances, sums


def check_statistics(case: Case) -> None:
    runtime = runtime_of(Compute(device="cpu", dtype="float32"), case.source)
    found = calibrate(case.source, case.windows, runtime)
    distances, sums = whole_model_sums(case)
    assert len(found.blocks) == BLOCKS
    for block, want in zip(found.blocks, distances, strict=True):
        assert block.tokens == case.windows.tokens_NT.numel()
        assert block.distance_sum == pytest.approx(want.total, rel=1e-5)
    for unit, of_unit in zip(case.source.units, found.units, strict=True):
        if not unit.routed:
            square_F = sums[unit.block, unit.down]
            torch.testing.assert_close(of_unit.sum_of_squares_F, square_F, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_whole_model(case):
    """Half of the windows have images, and the others none: they pass together."""
    assert [bool(images) for images in case.windows.images_N] == [True, True, False, False]
    check_statistics(case)


@pytest.mark.parametrize("model_type", ["gemma4", "internvl", "llama4", "glm4v", "qwen3_5"])
def test_statistics_of_what_a_processor_might_give(model_type):
    model = tiny_model(model_type)
    windows, source = image_windows(model_type, model), LoadedModel(model)
    check_statistics(Case(model, source, windows))
    # Of two processes one has the image.
    runtime = runtime_of(Compute(device="cpu", dtype="float32"), source)
    parts = [windows.part(part_of(windows, Team(rank, 2), None)) for rank in range(2)]
    assert [part.has_images for part in parts] == [True, False]
    first, second = (calibrate(source, part, runtime) for part in parts)
    whole = calibrate(source, windows, runtime)
    for a, b, both in zip(first.units, second.units, whole.units, strict=True):
        total_F = a.sum_of_squares_F + b.sum_of_squares_F
        torch.testing.assert_close(total_F, both.sum_of_squares_F, rtol=1e-5, atol=1e-5)
