"""Multimodal models are pruned from conversations about images, by the command and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import cfsp
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.result.manifest import read_manifest
from image_processors import chats_with_images, image_tokenizer, picture, save_multimodal

SIZES = ["--samples", "4", "--seqlen", "64"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return chats_with_images(tmp_path_factory.mktemp("chats"), 24)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """Gives the directory of a tiny multimodal model with its processor."""
    made: dict[str, Path] = {}

    def get(model_type):
        if model_type not in made:
            directory = tmp_path_factory.mktemp(model_type)
            save_multimodal(model_type, image_tokenizer(directory / "tokenizer"), directory / "m")
            made[model_type] = directory / "m"
        return made[model_type]

    return get


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "gemma3"])
def test_a_model_is_pruned_from_images_and_text(model_type, multimodal, chats, text_file, tmp_path):
    out = tmp_path / "out"
    data = ["--data", str(chats), "--data", str(text_file)]
    argv = ["prune", str(multimodal(model_type)), *data, *SIZES, "--sparsity", "0.4"]
    assert main([*argv, "--multiple", "8", "--out", str(out)]) == 0
    assert read_manifest(out)["calibration"]["sources"] == {str(chats): 2, str(text_file): 2}
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "stone"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    with torch.inference_mode():
        inputs = processor(text=[text], images=[[picture(0)]], return_tensors="pt")
        assert bool(torch.isfinite(model(**inputs).logits).all())


def test_a_killed_calibration_goes_on_with_the_same_bits(multimodal, chats, commands, tmp_path):
    """Qwen3-VL adds features of images to what leaves its first blocks: also after a kill."""
    argv = ["calibrate", str(multimodal("qwen3_vl")), "--data", str(chats), *SIZES, "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    commands.kill([*argv, str(tmp_path / "resumed")], "after", 1)
    assert main([*argv, str(tmp_path / "resumed")]) == 0
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repair", "local"], "--repair local reads text alone"),
        (
            ["--repair", "none", "--block-metric", "sensitivity"],
            "the block metric sensitivity reads text alone",
        ),
    ],
)
def test_what_reads_text_alone_is_refused(options, message, multimodal, chats, tmp_path, capsys):
    argv = ["prune", str(multimodal("llava")), "--data", str(chats), *SIZES, "--sparsity", "0.4"]
    assert main([*argv, "--multiple", "8", "--out", str(tmp_path / "out"), *options]) == 2
    assert f"{message}, and the text to calibrate on ({chats}) has images" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_is_given_its_processor(multimodal, chats):
    directory = multimodal("llava")
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    settings: dict[str, Any] = {"data": [chats], "samples": 4, "seqlen": 64, "device": "cpu"}
    read = cfsp.calibrate(directory, **settings)
    found = cfsp.calibrate(model, processor, **settings)
    assert found.record.tokens_digest == read.record.tokens_digest
    assert torch.equal(found.units[1].sum_of_squares_F, read.units[1].sum_of_squares_F)
    smaller = cfsp.prune(model, processor, sparsity=0.4, multiple=8, **settings)
    assert type(smaller).__name__ == f"Pruned{type(model).__name__}"
    with pytest.raises(UsageError, match="need the model's processor; give it in place of the"):
        cfsp.calibrate(model, processor.tokenizer, **settings)
