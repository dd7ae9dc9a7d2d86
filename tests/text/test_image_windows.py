"""Windows with images: equally long, whole images only, as the model's own processor makes them."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import draw_windows, windows_left_over
from cfsp.errors import CheckpointError, MissingExtraError, TextError, UsageError
from cfsp.text.drawing import consecutive_windows
from cfsp.text.sources import TextSource
from cfsp.text.tokenizers import beginning, is_processor, load_processor
from cfsp.text.windows import Windows, few_windows, joined
from image_processors import chats_with_images, image_tokenizer, picture, tiny_processor

SEQLEN = 64
IMAGE = 300  # the token


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("processor")
    tokenizer = image_tokenizer(directory / "tokenizer", bos=True)
    tiny_processor("llava", tokenizer).save_pretrained(directory)
    return load_processor(directory)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return chats_with_images(tmp_path_factory.mktemp("chats"), 24)


def draw(text: Path | str, processor: Any, **options: Any) -> Windows:
    chosen: dict[str, Any] = {"samples": 4, "seqlen": SEQLEN, **options}
    return draw_windows([str(text)], processor.tokenizer, processor=lambda: processor, **chosen)


def written(directory: Path, *records: dict[str, Any]) -> Path:
    path = directory / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_windows_are_equally_long_and_have_whole_images(chats, processor):
    windows = draw(chats, processor)
    assert windows.tokens_NT.shape == (4, SEQLEN)
    assert windows.sources == {str(chats): 4}
    for window, tokens_T in enumerate(windows.tokens_NT):
        # Every window begins as an input of the model does, and four tokens are one image.
        assert tokens_T[0] == processor.tokenizer.bos_token_id
        assert (tokens_T == processor.tokenizer.bos_token_id).sum() == 1
        images = windows.images_of(window)["pixel_values"]
        assert len(images) >= 1
        assert (tokens_T == IMAGE).sum() == 4 * len(images)
    assert torch.equal(windows.tokens_NT, draw(chats, processor).tokens_NT)
    assert not torch.equal(windows.tokens_NT, draw(chats, processor, seed=1).tokens_NT)


def test_a_window_is_what_the_processor_makes_of_its_samples(tmp_path, processor):
    names = ["a.png", "b.png"]
    for seed, name in enumerate(names):
        picture(seed).save(tmp_path / name)
    content = [{"type": "text", "text": "stone river " * 20}, {"type": "image"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    path = written(tmp_path, {"messages": messages, "images": names})
    want = processor(
        text=[processor.apply_chat_template(messages, tokenize=False)],
        images=[[picture(0), picture(1)]],
        return_tensors="pt",
    )
    length = want["input_ids"].shape[1]
    found = draw(path, processor, samples=1, seqlen=length)
    assert torch.equal(found.tokens_NT, want["input_ids"])
    assert torch.equal(found.images_of(0)["pixel_values"], want["pixel_values"])
    # Where nothing is said of places, images come first.
    plain = [{"role": "user", "content": "stone river " * 20}]
    path = written(tmp_path, {"messages": plain, "images": names})
    window_T = draw(path, processor, samples=1, seqlen=length).tokens_NT[0]
    begin = processor.tokenizer("user:" + 8 * "<image>" + "stone")["input_ids"]
    assert window_T[: len(begin)].tolist() == begin


def test_where_no_image_fits_the_window_goes_on_with_text(tmp_path, processor):
    """Three images have twelve tokens: two samples leave room for some texts, and no images."""
    picture(0).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": "stone"}]
    path = written(tmp_path, *[{"messages": messages, "images": ["a.png"] * 3}] * 9)
    text, plain = "user:" + 12 * "<image>" + "stone", "user:stone"

    def ids(text: str) -> list[int]:
        return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    seqlen = 2 * len(ids(text)) + 11
    windows = draw(path, processor, samples=3, seqlen=seqlen, bos="no")
    assert len(ids(plain)) < 11  # more than one text
    want = (ids(2 * text) + 3 * ids(plain))[:seqlen]
    assert windows.tokens_NT.tolist() == [want] * 3


def test_too_large_images_are_left_out_and_told(tmp_path, processor, caplog):
    picture(0).save(tmp_path / "a.png")
    large = {"messages": [{"role": "user", "content": "river"}], "images": ["a.png"] * 20}
    small = {"messages": [{"role": "user", "content": "stone " * 80}], "images": ["a.png"]}
    with caplog.at_level(logging.WARNING):
        draw(written(tmp_path, large, small, small), processor, samples=2, bos="no")
    assert "1 samples were left out, whose images need up to" in caplog.text
    with pytest.raises(TextError, match=r"holds 0 windows of 64 .* raise --seqlen to at least"):
        draw(written(tmp_path, large), processor, samples=None)
    with pytest.raises(TextError, match=r"holds 1 windows of 64 tokens with images, 4 are needed"):
        draw(written(tmp_path, small), processor)


def test_the_digest_covers_every_pixel(chats, processor):
    windows = draw(chats, processor)
    assert windows.digest == draw(chats, processor).digest
    pixels = windows.images_of(2)["pixel_values"].clone()
    pixels[0, 0, 0, 0] += 1e-3
    changed = [*windows.images_N]
    changed[2] = {**changed[2], "pixel_values": pixels}
    assert replace(windows, images_N=tuple(changed)).digest != windows.digest
    assert replace(windows, images_N=()).digest != windows.digest


def test_parts_keep_their_images(chats, text_file, processor):
    windows = draw(chats, processor)
    text = draw_windows([str(text_file)], processor.tokenizer, samples=3, seqlen=SEQLEN)
    both = joined([text, windows])
    assert both.sources == {**text.sources, **windows.sources}
    assert both.images_N == ({}, {}, {}, *windows.images_N)
    assert few_windows(both, 2).images_N == (both.images_N[1], both.images_N[-2])
    assert joined([text, text]).images_N == ()
    assert not text.has_images


def test_images_may_be_bytes_and_pictures(tmp_path, processor, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture(0).save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    messages = [{"role": "user", "content": [
        {"type": "image", "text": None}, {"type": "text", "text": "stone " * 90}]}]  # fmt: skip
    columns = {"messages": [messages] * 2, "images": [[stored]] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    named = draw(
        written(tmp_path, *[{"messages": messages, "images": ["a.png"]}] * 2), processor, samples=2
    )
    of_hub = {"messages": messages, "images": [picture(0)]}
    monkeypatch.setattr("cfsp.text.sources.hub_columns", lambda *_: of_hub)
    monkeypatch.setattr("cfsp.text.sources.hub_records", lambda *_: iter([(of_hub, "there")] * 2))
    for text in (tmp_path / "a.parquet:messages", "someone/chats:default:train:messages"):
        assert draw(text, processor, samples=2).digest == named.digest


def test_images_beside_plain_text_are_left_out_and_told(tmp_path, processor, caplog):
    records = [{"text": "stone " * 90, "images": ["a.png"]}] * 4
    windows = draw(written(tmp_path, *records), processor, samples=1)
    assert not windows.has_images
    assert "only its text is read (images beside messages are" in caplog.text


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["none.png"], "there is no image .*none.png; paths are relative to the file"),
        (["records.jsonl"], "records.jsonl cannot be read .UnidentifiedImageError"),
        (["https://example.org/a.png"], "is not a local file; download it and name its path"),
        ([3], "column 'images' has a int, expected paths"),
        ([], r'the messages have 1 parts {"type": "image"}, the column \'images\' has 0'),
    ],
)
def test_what_is_no_image_is_refused(images, message, tmp_path, processor):
    content = [{"type": "image"}, {"type": "text", "text": "stone"}]
    record = {"messages": [{"role": "user", "content": content}], "images": images}
    with pytest.raises(TextError, match=f"records.jsonl, line 1: .*{message}"):
        draw(written(tmp_path, record), processor)


def test_what_reads_text_alone_says_so(chats, processor, caplog):
    with caplog.at_level(logging.WARNING):
        windows = consecutive_windows(str(chats), processor.tokenizer, count=2, seqlen=32)
    assert not windows.has_images
    assert IMAGE not in windows.tokens_NT
    assert f"{chats}: its images are left out here, only its text is read" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not draw_windows([str(chats)], processor.tokenizer, samples=2, seqlen=8).has_images
    assert "its images are left out" in caplog.text
    with pytest.raises(UsageError, match="a text to calibrate on has images; say how much"):
        windows_left_over([str(chats)], processor.tokenizer, samples=2, seqlen=8, seed=0, count=1)


def test_images_in_messages_need_their_column(tmp_path):
    path = written(tmp_path, {"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    with pytest.raises(TextError, match="a message has an image, but there is no column 'images'"):
        TextSource(str(path), "calibration").open()


def test_a_model_without_processor_is_told(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="carries no usable processor, which images need"):
        load_processor(tmp_path)
    assert not is_processor(tokenizer)


def test_pillow_is_an_extra(chats, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"reading images needs packages .*\[images\]"):
        draw(chats, processor)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_bos_stands_where_the_processor_writes_it(tmp_path, chats):
    """PaliGemma's writes it behind the images; the tokenizer alone puts it first."""
    tokenizer = image_tokenizer(tmp_path / "tokenizer", bos=True)
    assert beginning(tokenizer) == (tokenizer.bos_token_id,)
    processor = tiny_processor("paligemma", image_tokenizer(tmp_path / "own"))
    windows = draw_windows(
        [str(chats)], tokenizer, samples=1, seqlen=SEQLEN, processor=lambda: processor
    )
    window_T = windows.tokens_NT[0].tolist()
    assert window_T[0] != tokenizer.bos_token_id
    assert tokenizer.bos_token_id in window_T
