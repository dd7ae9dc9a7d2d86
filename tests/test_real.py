"""The real SmolLM2-135M: what pruning costs in perplexity, against measured reference values.

One calibration (32 windows x 1024 tokens of WikiText-2 validation, bf16) serves all plans.
Perplexity is on the first 12 windows x 1024 tokens of WikiText-2 test and of C4 validation.
About three minutes on two cores; needs the data directory (see conftest.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.families import intermediate_sizes
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main

pytestmark = pytest.mark.real

SEQLEN = 1024
WINDOWS = 12

# Dense perplexity on this text, as measured when the method was chosen.
DENSE = {"wikitext2": 26.4, "c4": 33.4}


@pytest.fixture(scope="module", autouse=True)
def all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(data_directory: Path) -> dict[str, str]:
    return {
        "wikitext2": str(data_directory / "wikitext2" / "test.parquet"),
        "c4": str(data_directory / "c4" / "validation.jsonl"),
    }


@pytest.fixture(scope="module")
def statistics(
    demo: Checkpoint, data_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Statistics, Path]:
    text = str(data_directory / "wikitext2" / "validation.parquet")
    gathered = cfsp.calibrate("demo", data=[text], samples=32, seqlen=SEQLEN)
    path = tmp_path_factory.mktemp("statistics") / "wikitext2.safetensors"
    gathered.save(path)
    return gathered, path


@pytest.fixture(scope="module")
def perplexity(texts: dict[str, str]) -> Callable[[str | Path, str], float]:
    """Measure a model on a text by name."""

    def measure(model: str | Path, text: str) -> float:
        entry = cfsp.evaluate([model], [texts[text]], windows=WINDOWS, seqlen=SEQLEN)[0]
        assert entry["dtype"] == "bfloat16"
        assert entry["tokens"] == {texts[text]: WINDOWS * (SEQLEN - 1)}
        value: float = entry["perplexity"][texts[text]]
        return value

    return measure


@pytest.fixture
def prune(
    statistics: tuple[Statistics, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Path]:
    """Prune without restoration by the published channel score, from the one calibration."""

    def run(sparsity: float, block_metric: str) -> Path:
        out = tmp_path / "pruned"
        argv: list[Any] = [
            "prune", "demo", "--out", out, "--statistics", statistics[1], "--sparsity", sparsity,
            "--block-metric", block_metric, "--channel-metric", "activation",
            "--repair", "none",
        ]  # fmt: skip
        status = main([str(argument) for argument in argv])
        assert status == 0, capsys.readouterr().err
        return out

    return run


def test_statistics_of_a_trained_model(statistics: tuple[Statistics, Path]) -> None:
    gathered, _ = statistics
    assert len(gathered.blocks) == 30
    assert gathered.tokens == 32 * SEQLEN
    angular_L = gathered.distances("angular")
    # The first block turns the embeddings into something else; no later one moves so far.
    assert max(angular_L) == angular_L[0]
    assert all(0 < distance < 1 for distance in angular_L)


@pytest.mark.parametrize("text", DENSE)
def test_dense_perplexity(perplexity: Callable[[str | Path, str], float], text: str) -> None:
    assert perplexity("demo", text) == pytest.approx(DENSE[text], rel=0.01)


def test_a_fifth_of_the_channels_goes(
    prune: Callable[..., Path], perplexity: Callable[[str | Path, str], float]
) -> None:
    out = prune(0.2, "angular")
    assert perplexity(out, "wikitext2") <= 36.5
    assert perplexity(out, "c4") <= 56
    kept = sum(intermediate_sizes(Checkpoint(out).config))
    assert abs(kept - 0.8 * 30 * 1536) <= 32


def test_half_of_the_channels_goes(
    prune: Callable[..., Path], perplexity: Callable[[str | Path, str], float]
) -> None:
    assert perplexity(prune(0.5, "angular"), "wikitext2") <= 82


def test_uniform_allocation_is_clearly_worse(
    prune: Callable[..., Path], perplexity: Callable[[str | Path, str], float]
) -> None:
    assert perplexity(prune(0.5, "uniform"), "wikitext2") > 100


def test_pruned_model_writes_english(prune: Callable[..., Path]) -> None:
    """It generates with plain transformers calls, and not just one token over and over."""
    from cfsp.text.tokenizers import load_tokenizer

    out = prune(0.2, "angular")
    model, tokenizer = cfsp.load(out), load_tokenizer(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    new = generated[0, prompt["input_ids"].shape[1] :]
    assert len(new) == 24 or int(new[-1]) == tokenizer.eos_token_id
    assert len(set(new.tolist())) >= min(4, len(new))
