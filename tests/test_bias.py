"""Compensation by a bias: against NumPy, through files, in memory, and in what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cfsp
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import CfspError, ExportError
from cfsp.exports.registry import export_checkpoint
from cfsp.result.manifest import read_manifest
from tiny_models import DENSE_CONFIGS, WIDTH, build_tiny_model

TOKENS = torch.arange(24)[None] * 7 % 320


def prune(model: Path, out: Path, text: Path, *more: str) -> int:
    return main(
        ["prune", str(model), "--sparsity", "0.5", "--multiple", "8", "--data", str(text),
         "--samples", "8", "--seqlen", "32", "--restore", "bias", "--out", str(out), *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def compensated(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("bias") / "out"
    assert prune(tiny_checkpoint("llama"), out, text_file) == 0
    return out


def test_bias_is_the_mean_contribution_of_what_was_removed(
    compensated: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    dense, pruned = Checkpoint(tiny_checkpoint("llama")), Checkpoint(compensated)
    plan = cfsp.PruningPlan.load(compensated / "cfsp_plan.json")
    statistics = cfsp.Statistics.load(compensated / "cfsp.statistics")
    for i, entry in enumerate(plan.blocks):
        down = dense.read(f"model.layers.{i}.mlp.down_proj.weight").double().numpy()
        mean = statistics.blocks[i].sum_F.numpy() / statistics.tokens
        pruned_P = np.setdiff1d(np.arange(WIDTH), entry.kept)
        bias = pruned.read(f"model.layers.{i}.mlp.down_proj.bias").numpy()
        np.testing.assert_allclose(bias, down[:, pruned_P] @ mean[pruned_P], rtol=1e-5, atol=1e-7)
        assert np.abs(bias).max() > 0


def test_manifest_counts_the_biases(compensated: Path) -> None:
    manifest = read_manifest(compensated)
    assert manifest is not None
    assert manifest["restoration"]["method"] == "bias"
    model = load(compensated)
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters_after"]
    assert main(["verify", str(compensated)]) == 0


def test_logits_are_those_of_pruned_channels_at_their_mean(
    compensated: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    dense = load(tiny_checkpoint("llama"))
    plan = cfsp.PruningPlan.load(compensated / "cfsp_plan.json")
    statistics = cfsp.Statistics.load(compensated / "cfsp.statistics")
    for layer, entry, block in zip(dense.model.layers, plan.blocks, statistics.blocks, strict=True):
        is_kept_F = torch.zeros(WIDTH, dtype=torch.bool)
        is_kept_F[list(entry.kept)] = True
        mean_F = block.mean_F.float()

        def at_mean(
            module: Any, args: Any, kept: torch.Tensor = is_kept_F, mean: torch.Tensor = mean_F
        ) -> torch.Tensor:
            return torch.where(kept, args[0], mean)

        layer.mlp.down_proj.register_forward_pre_hook(at_mean)
    with torch.inference_mode():
        expected = dense(TOKENS).logits
        found = load(compensated)(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_loads_without_cfsp_and_saves_again(compensated: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(compensated, trust_remote_code=True).eval()
    first.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.inference_mode():
        expected = load(compensated)(TOKENS).logits
        assert torch.equal(first(TOKENS).logits, expected)
        assert torch.equal(again(TOKENS).logits, expected)


@pytest.mark.parametrize("name", sorted(DENSE_CONFIGS))
def test_every_family_in_memory_and_in_files(
    name: str,
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    directory = tiny_checkpoint(name)
    # Equal widths: the modelling file is there for the bias alone, or not at all.
    assert prune(directory, tmp_path / "out", text_file, "--block-metric", "uniform") == 0
    small = cfsp.prune(
        build_tiny_model(name),
        tokenizer,
        sparsity=0.5,
        multiple=8,
        data=[text_file],
        samples=8,
        seqlen=32,
        block_metric="uniform",
        restore="bias",
    )
    had_bias = Checkpoint(directory).family.down_bias_name(0) in Checkpoint(directory).specs
    assert (tmp_path / "out" / "modeling_cfsp.py").is_file() == (not had_bias)
    with torch.inference_mode():
        torch.testing.assert_close(
            small(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits, rtol=1e-4, atol=1e-4
        )


def test_pruning_again_keeps_the_biases(compensated: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prune(compensated, out, text_file, "--block-metric", "global") == 0
    names = set(Checkpoint(compensated).specs)
    assert set(Checkpoint(out).specs) == names
    assert json.loads((out / "config.json").read_text())["cfsp_down_bias"] is True
    assert not torch.equal(
        Checkpoint(out).read("model.layers.1.mlp.down_proj.bias"),
        Checkpoint(compensated).read("model.layers.1.mlp.down_proj.bias"),
    )


def test_a_plan_without_statistics_is_compensated_too(
    compensated: Path, tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    code = main(
        ["prune", str(tiny_checkpoint("llama")), "--plan", str(compensated / "cfsp_plan.json"),
         "--data", str(text_file), "--samples", "8", "--seqlen", "32", "--restore", "bias",
         "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    name = "model.layers.0.mlp.down_proj.bias"
    assert torch.equal(Checkpoint(tmp_path / "out").read(name), Checkpoint(compensated).read(name))


def test_experts_are_refused(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prune(tiny_checkpoint("mixtral"), tmp_path / "out", text_file) == 2
    assert "--restore bias is not possible for mixtral" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["padded", "vllm"])
def test_targets_of_the_stock_class_refuse_by_name(
    target: str, compensated: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"bias of the down projections"):
        export_checkpoint(Checkpoint(compensated), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_metric", ["angular", "uniform"])
def test_llama_cpp_reads_the_biases(
    block_metric: str,
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Its graph `deci` for different widths and `llama` for equal ones; logits are compared."""
    pytest.importorskip("gguf")
    pruned, out = tmp_path / "pruned", tmp_path / "out.gguf"
    assert prune(tiny_checkpoint("llama"), pruned, text_file, "--block-metric", block_metric) == 0
    report = export_checkpoint(Checkpoint(pruned), "gguf", out)
    assert report.layout.startswith("deci" if block_metric == "angular" else "llama")
    from gguf import GGUFReader

    assert "blk.0.ffn_down.bias" in {tensor.name for tensor in GGUFReader(out).tensors}


def test_openvino_has_the_biases(compensated: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export_checkpoint(Checkpoint(compensated), "openvino", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "cfsp_down_bias" not in config
    assert "auto_map" not in config


def test_recovery_keeps_the_biases_and_a_report_is_made(
    compensated: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = main(
        ["recover", str(compensated), "--data", str(text_file), "--rank", "2", "--batch-windows",
         "4", "--seqlen", "32", "--steps", "2", "--out", str(out)]
    )  # fmt: skip
    assert code == 0
    name = "model.layers.1.mlp.down_proj.bias"
    assert torch.equal(Checkpoint(out).read(name), Checkpoint(compensated).read(name))
    assert torch.isfinite(load(out)(TOKENS).logits).all()
    page = tmp_path / "report.html"
    assert main(["report", str(compensated), "--out", str(page)]) == 0
    assert "competition of all channels" not in page.read_text()
    assert "trust_remote_code=True" in page.read_text()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_llama_cpp_graphs_without_ffn_biases_are_refused(
    name: str, tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "out"
    assert prune(tiny_checkpoint(name), out, text_file, "--block-metric", "uniform") == 0
    with pytest.raises(CfspError, match=r"reads no .*bias.*down_proj\.bias"):
        export_checkpoint(Checkpoint(out), "gguf", tmp_path / "out.gguf")
