"""Statistics and plans of a whole tiny model: what they may and may not depend on."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import cfsp
from builders import (
    RECORD,
    draw_windows,
    job_of,
    random_block,
    random_tokens,
    random_unit_statistics,
    statistics_with_distances,
)
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.errors import CalibrationError, StatisticsError, UsageError
from cfsp.settings import Budget, Compute, PruneSettings
from cfsp.text.windows import Windows
from tiny_decoders import tiny_model


@pytest.fixture(scope="module")
def source(tiny_checkpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def windows(text_file, tokenizer) -> Windows:
    return draw_windows([str(text_file)], tokenizer, samples=9, seqlen=32)


def gather(source: Checkpoint, windows: Windows, batch: int | None = None) -> Statistics:
    settings = PruneSettings(Budget(), compute=Compute("cpu", "float32", batch))
    return calibrate(job_of(source, settings), windows)


def assert_statistics_close(actual: Statistics, expected: Statistics, scale: float = 1.0) -> None:
    for got, want in zip(actual.blocks, expected.blocks, strict=True):
        assert got.distance == pytest.approx(want.distance, rel=1e-4)
    for got, want in zip(actual.units, expected.units, strict=True):
        torch.testing.assert_close(
            got.sum_of_squares_F, want.sum_of_squares_F * scale, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_do_not_depend_on_the_batch_size(source, windows, batch):
    """Nor on the number of windows: the same text three times has three times the sums."""
    expected = gather(source, windows)
    assert_statistics_close(gather(source, windows, batch), expected)
    thrice = Windows(windows.tokens_NT.repeat(3, 1), {"text": 27})
    assert_statistics_close(gather(source, thrice, batch), expected, scale=3.0)


def test_same_seed_gives_the_same_plan_byte_for_byte(source, text_file, other_text_file):
    def plan(seed: int) -> str:
        data = [str(text_file), str(other_text_file)]
        statistics = cfsp.calibrate(source.directory, data=data, samples=6, seqlen=32, seed=seed)
        return cfsp.plan(source.directory, statistics, sparsity=0.3, multiple=1).to_json()

    assert plan(5) == plan(5)
    assert plan(5) != plan(6)


def test_statistics_survive_a_file(tmp_path):
    """Of a block with no FFN, and of one with two."""
    routed = replace(random_unit_statistics(8, block=1), routed_E=(40, 24))
    two = (routed, random_unit_statistics(12, seed=1, block=1))
    blocks = [replace(random_block(8), units=units) for units in ((), two)]
    sensitivity = Sensitivity((0.0, 0.25), (1.0, 0.5), 4)
    statistics = replace(Statistics.of(blocks, RECORD), sensitivity=sensitivity)
    path, again = tmp_path / "deep" / "s.safetensors", tmp_path / "again"
    statistics.save(str(path))
    loaded = Statistics.load(str(path))
    assert (loaded.record, loaded.blocks) == (statistics.record, statistics.blocks)
    for got, want in zip(loaded.units, statistics.units, strict=True):
        assert (got.block, got.tokens, got.routed_E) == (want.block, want.tokens, want.routed_E)
        assert torch.equal(got.sum_of_squares_F, want.sum_of_squares_F)
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert loaded.sensitivity == statistics.sensitivity
    assert loaded.blocks_with_units == [1]
    assert not loaded.has_one_unit_each
    wrong = [replace(unit, block=2 - i) for i, unit in enumerate(statistics.units)]
    replace(statistics, units=tuple(wrong)).save(path)
    with pytest.raises(StatisticsError, match="are said to be in blocks"):
        Statistics.load(path)


def test_a_sensitivity_that_cannot_be_is_refused(tmp_path):
    plain, path = statistics_with_distances([0.2, 0.1]), tmp_path / "stats.safetensors"
    for wrong in ((0.25,), (0.25, -0.1), (0.25, float("nan"))):
        replace(plain, sensitivity=Sensitivity(wrong, (0.5, 0.5), 4)).save(path)
        with pytest.raises(StatisticsError, match="is damaged"):
            Statistics.load(path)
    for name, found in (("absent", "absent does not exist"), ("", "is a directory")):
        with pytest.raises(StatisticsError, match=rf"{found}; .*cfsp calibrate .*DIR/cfsp.stat"):
            Statistics.load(tmp_path / name)
    for use in (plain.save, Statistics.load):
        with pytest.raises(UsageError, match="File name too long; give another path"):
            use(tmp_path / (999 * "x"))


@pytest.mark.parametrize(
    ("name", "ffn", "how"),
    [
        ("qwen2", "mlp", {"sparsity": 0.4}),
        ("qwen2", "mlp", {"parts": ("blocks",), "sparsity": 0.4}),
        ("qwen2", "mlp", {"parts": ("ffn", "kv"), "target_params": 0.8}),
        ("qwen2", "mlp", {"parts": ("attention",), "sparsity": 0.4}),
        # Experts that are all given all tokens, with zeros for those of others.
        ("llama4_text", "feed_forward.experts", {"sparsity": 0.4}),
    ],
)
def test_a_model_with_a_part_that_gives_nothing_is_pruned(
    name, ffn, how, save, text_file, tmp_path
):
    """No token misses an FFN that is no expert; models made smaller elsewhere have zeroed ones."""
    model = tiny_model(name)
    blocks = model.model.layers
    for projection in (blocks[1].get_submodule(ffn), blocks[0].self_attn):
        for weight in projection.parameters():
            weight.data.zero_()
    text: dict[str, Any] = {"data": [text_file], "samples": 8, "seqlen": 32}
    report = cfsp.prune(save(model), out=tmp_path / "out", **text, **how)
    assert report.parameters_after < report.parameters_before
    cfsp.load(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_nan_of_experts_is_told_with_what_to_do(model_type):
    model = tiny_model(model_type)
    with torch.no_grad():
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight.fill_(1.0)
        attention.o_proj.weight.fill_(6e4)
        model.get_input_embeddings().weight.mul_(100)
    compute = Compute("cpu", "float16")
    job = job_of(LoadedModel(model.half()), PruneSettings(Budget(), compute=compute))
    with pytest.raises(CalibrationError, match=r"block 1 produced NaN .* --dtype float32"):
        calibrate(job, Windows(random_tokens(4, 12), {"text": 4}))
