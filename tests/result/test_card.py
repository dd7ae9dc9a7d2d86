"""The model card: what it tells the hub, and what it tells people."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.card import Origin, model_card, origin_of
from cfsp.result.manifest import read_manifest
from report_runs import measured


def metadata(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(directory / "README.md").data.to_dict()
    return found


def card_of(run: Path, origin: Origin, **changes: Any) -> str:
    manifest = read_manifest(run)
    assert manifest is not None
    return model_card(manifest | changes, PruningPlan.load(run / "cfsp_plan.json"), origin)


def test_metadata_of_the_source_stay(run: Path) -> None:
    found = metadata(run)
    assert found["base_model"] == "someone/ancestor"
    assert found["license"] == "other" and found["license_name"] == "tiny-community"
    assert found["license_link"] == "LICENSE"
    assert found["language"] == ["en", "de"] and found["datasets"] == ["someone/corpus"]
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["cfsp", "pruned", "chat"]
    assert "widget" not in found


def test_results_have_their_conditions(run: Path, text_file: Path) -> None:
    entry = measured(str(text_file), 10.0, 12.5, seqlen=1024, bos=True)
    text = card_of(run, Origin("x", "owner/name", "owner/name"), perplexity=entry)
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert card.data.model_name == "my-model-pruned"
    assert result.dataset_name == result.dataset_type == text_file.name  # no local path
    assert result.metric_type == "perplexity" and result.metric_value == 12.5
    assert result.dataset_args == {
        "windows": 12, "seqlen": 1024, "bos": True, "predicted_tokens": 12 * 1023,
    }  # fmt: skip
    assert "12 windows of 1,024 tokens, with BOS; this text made the model" in text
    assert result.metric_name.endswith("with BOS; this text made the model")


def test_card_says_what_was_done_and_on_which_text(run: Path, text_file: Path) -> None:
    text = (run / "README.md").read_text()
    assert "# my-model, pruned" in text
    assert "`my-model` (which was made from [someone/ancestor](https://huggingface.co/" in text
    assert "without 50.0% of FFN channels" in text
    assert f"Calibrated on {text_file.name} (8 windows)" in text
    assert "Repaired on the same text (ridge)" in text
    assert "is **flattering**" in text
    assert "trust_remote_code=True" in text and "read it first" in text
    assert "cfsp verify ." in text and "## Limits" in text
    assert "the license of that model (`other`) applies" in text


def test_card_without_repair_and_of_equal_widths(run: Path) -> None:
    text = card_of(run, Origin("x"), repair={"steps": []}, files={})
    assert "Repaired" not in text and "repair: none" in text
    assert "trust_remote_code" not in text
    assert "base_model" not in text.split("---")[1] and "license" not in text.split("---")[1]
    assert "the license of that model applies" in text
    text = card_of(run, Origin("x"), perplexity={})
    assert "model-index" not in text and "model_name" not in text


def test_recovery_updates_the_card(run: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    train = ["--data", str(text_file), "--steps", "1", "--seqlen", "32", "--batch-windows", "1"]
    assert main(["recover", str(run), *train, "--out", str(out)]) == 0
    found, text = metadata(out), (out / "README.md").read_text()
    assert found["base_model"] == "someone/ancestor" and found["license"] == "other"
    assert "# my-model, pruned and recovered" in text
    assert f"Recovered: trained on {text_file.name} (" in text
    assert "## How it was pruned" in text and "## How it was recovered" in text
    assert f"cfsp recover run --data {text_file.name} --steps 1" in text
    assert "--out recovered\n" in text
    for place in (run, text_file, tmp_path):
        assert str(place.parent) not in text  # the hub shows it to everybody
    assert main(["verify", str(out)]) == 0


def test_the_demo_has_its_real_name(
    tiny_checkpoint: Callable[[str], Path], run: Path, tmp_path: Path
) -> None:
    demo = origin_of(Checkpoint(tiny_checkpoint("llama"), label="demo"))
    assert demo.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = card_of(run, demo, base_model={"name": "demo"})
    assert "# HuggingFaceTB/SmolLM2-135M-Instruct, pruned" in text
    assert "license: apache-2.0" in text and "`demo`" not in text
    # Pruned again, it is made from what was made from the demo.
    text = card_of(run, demo, base_model={"name": "/somewhere/once"})
    assert "`once` (which was made from [HuggingFaceTB/" in text


@pytest.mark.parametrize(
    ("label", "saved", "expected"),
    [
        ("owner/name", None, "owner/name"),
        ("owner/name@main", None, "owner/name@main"),
        ("owner/name@](x)", None, None),
        ("/home/me/models/name", None, None),
        ("/cache/models--owner--my-name/snapshots/abc123", None, "owner/my-name"),
        ("./name", "owner/saved", "owner/saved"),
        ("./name", "/home/me/name", None),
        ("./name", "../owner/name", None),
        ("./name", ["owner/name"], None),
    ],
)
def test_hub_id_of_a_source(
    tiny_checkpoint: Callable[[str], Path], label: str, saved: Any, expected: str | None
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"), label=label)
    source.config._name_or_path = saved
    assert origin_of(source).hub_id == expected


@pytest.mark.parametrize("card", ["", "no metadata", "---\n[\n---\n", "---\n- a\n---\n", "\0"])
def test_a_card_that_cannot_be_read_tells_nothing(
    source_with_card: Path, tmp_path: Path, card: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source_with_card, copy)
    (copy / "README.md").write_text(card)
    assert origin_of(open_checkpoint(copy)).metadata == {}


def test_foreign_text_cannot_format_the_card(run: Path) -> None:
    hostile = "x`\n---\n# <script>alert(1)</script> | [a](javascript:1)"
    origin = Origin(hostile, metadata={"license": hostile, "tags": [hostile]})
    text = card_of(run, origin, base_model={"name": hostile}, perplexity=measured(hostile, 1, 2))
    card = ModelCard(text)
    assert card.data.license == hostile
    for line in card.text.splitlines():
        assert not any("<script>" in outside for outside in line.split("`")[::2])
        assert line != "---"
