"""Statistics and plans of a whole tiny model: what they may and may not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from builders import RECORD, random_block, random_unit_statistics, statistics_with_distances
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CalibrationError, StatisticsError
from cfsp.streaming.runtime import Runtime
from cfsp.text.windows import Windows
from drawn_windows import draw_windows


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def windows(text_file: Path, tokenizer: Any) -> Windows:
    return draw_windows([str(text_file)], tokenizer, samples=9, seqlen=32)


def gather(source: Checkpoint, windows: Windows, batch: int | None = None) -> Statistics:
    return calibrate(
        source,
        windows,
        Runtime(torch.device("cpu"), torch.float32, batch),
    )


def assert_statistics_close(actual: Statistics, expected: Statistics, scale: float = 1.0) -> None:
    for got, want in zip(actual.blocks, expected.blocks, strict=True):
        assert got.distances == pytest.approx(want.distances, rel=1e-4)
    for got, want in zip(actual.units, expected.units, strict=True):
        torch.testing.assert_close(
            got.sum_of_squares_F, want.sum_of_squares_F * scale, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_do_not_depend_on_the_batch_size(
    source: Checkpoint, windows: Windows, batch: int
) -> None:
    assert_statistics_close(gather(source, windows, batch), gather(source, windows))


def test_statistics_do_not_depend_on_the_number_of_windows(
    source: Checkpoint, windows: Windows
) -> None:
    """The same text three times: the same means, three times the sums."""
    thrice = Windows(windows.tokens_NT.repeat(3, 1), {"text": 27})
    assert_statistics_close(gather(source, thrice), gather(source, windows), scale=3.0)


def test_statistics_of_parts_add_up(source: Checkpoint, windows: Windows) -> None:
    whole = gather(source, windows)
    first = gather(source, Windows(windows.tokens_NT[:4], {"text": 4}))
    second = gather(source, Windows(windows.tokens_NT[4:], {"text": 5}))
    for a, b, both in zip(first.units, second.units, whole.units, strict=True):
        torch.testing.assert_close(
            a.sum_of_squares_F + b.sum_of_squares_F, both.sum_of_squares_F, rtol=1e-4, atol=1e-6
        )
    for a, b, both in zip(first.blocks, second.blocks, whole.blocks, strict=True):
        mean = (4 * a.distances["angular"] + 5 * b.distances["angular"]) / 9
        assert mean == pytest.approx(both.distances["angular"], rel=1e-5)


def test_same_seed_gives_the_same_plan_byte_for_byte(
    source: Checkpoint, text_file: Path, other_text_file: Path
) -> None:
    def plan(seed: int) -> str:
        data = [str(text_file), str(other_text_file)]
        statistics = cfsp.calibrate(source.directory, data=data, samples=6, seqlen=32, seed=seed)
        return cfsp.plan(source.directory, statistics, sparsity=0.3, multiple=1).to_json()

    assert plan(5) == plan(5)
    assert plan(5) != plan(6)


def assert_same(actual: Statistics, expected: Statistics) -> None:
    assert actual.blocks == expected.blocks
    for got, want in zip(actual.units, expected.units, strict=True):
        assert (got.block, got.tokens, got.routed_E) == (want.block, want.tokens, want.routed_E)
        assert torch.equal(got.sum_of_squares_F, want.sum_of_squares_F)


def test_statistics_of_blocks_with_no_ffn_and_with_two_survive_a_file(tmp_path: Path) -> None:
    blocks = [
        replace(random_block(8), units=()),
        replace(
            random_block(8),
            units=(
                replace(random_unit_statistics(8, block=1), routed_E=(40, 24)),
                random_unit_statistics(12, seed=1, block=1),
            ),
        ),
    ]
    statistics = Statistics.of(blocks, RECORD, Sensitivity((0.0, 0.25), (1.0, 0.5), 4))
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert_same(loaded, statistics)
    assert loaded.sensitivity == statistics.sensitivity
    assert loaded.blocks_with_units == [1]
    assert not loaded.has_one_unit_each
    wrong = [replace(unit, block=2 - i) for i, unit in enumerate(statistics.units)]
    replace(statistics, units=tuple(wrong)).save(path)
    with pytest.raises(StatisticsError, match="are said to be in blocks"):
        Statistics.load(path)


def test_statistics_survive_a_file(source: Checkpoint, windows: Windows, tmp_path: Path) -> None:
    statistics = gather(source, windows)
    statistics.save(tmp_path / "deep" / "s.safetensors")
    loaded = Statistics.load(tmp_path / "deep" / "s.safetensors")
    assert loaded.record == statistics.record
    assert_same(loaded, statistics)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == (tmp_path / "deep" / "s.safetensors").read_bytes()
    plans = {cfsp.plan(source.directory, s, sparsity=0.4).to_json() for s in (statistics, loaded)}
    assert len(plans) == 1


def test_sensitivity_survives_a_file_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    plain = statistics_with_distances({"angular": [0.2, 0.1]})
    measured = replace(plain, sensitivity=Sensitivity((0.25, 0.0), (0.5, 2 / 3), 4))
    measured.save(path)
    assert Statistics.load(path).sensitivity == measured.sensitivity
    plain.save(path)
    assert Statistics.load(path).sensitivity is None
    for wrong in ((0.25,), (0.25, -0.1), (0.25, float("nan"))):
        replace(plain, sensitivity=Sensitivity(wrong, (0.5, 0.5), 4)).save(path)
        with pytest.raises(StatisticsError, match="is damaged"):
            Statistics.load(path)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    statistics = statistics_with_distances({"angular": [0.1, 0.2]})
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    with pytest.raises(StatisticsError, match=r"absent.* does not exist.*cfsp calibrate"):
        Statistics.load(tmp_path / "absent")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StatisticsError, match=r"cut\.safetensors"):
        Statistics.load(cut)
    # Version 4 had sums besides, which nothing read.
    before = tmp_path / "before.safetensors"
    before.write_bytes(path.read_bytes().replace(b'version\\": 5', b'version\\": 4'))
    assert_same(Statistics.load(before), statistics)
    other = tmp_path / "version.safetensors"
    other.write_bytes(path.read_bytes().replace(b'version\\": 5', b'version\\": 9'))
    with pytest.raises(StatisticsError, match="version 9"):
        Statistics.load(other)
    nan = tmp_path / "nan.safetensors"
    bad = random_unit_statistics(8, block=1)
    bad.sum_of_squares_F[2] = torch.nan
    replace(statistics, units=(statistics.units[0], bad)).save(nan)
    with pytest.raises(StatisticsError, match="block 1"):
        Statistics.load(nan)


def test_statistics_of_another_model_are_refused(
    source: Checkpoint, windows: Windows, tiny_checkpoint: Callable[[str], Path]
) -> None:
    statistics = gather(source, windows)
    with pytest.raises(StatisticsError, match=r"were made for .*qwen2.*not for .*qwen3"):
        cfsp.plan(tiny_checkpoint("qwen3"), statistics, sparsity=0.4)


def test_tokenizer_of_another_model_is_refused(source: Checkpoint) -> None:
    with pytest.raises(CalibrationError, match=r"token id 320.*vocabulary of 320"):
        gather(source, Windows(torch.full((2, 32), 320), {"text": 2}))
