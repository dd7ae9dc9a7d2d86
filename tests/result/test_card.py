"""The model card: what it tells the hub, and what it tells people."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import cfsp
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint
from cfsp.result.card import Origin, model_card, origin_of
from cfsp.result.manifest import read_manifest
from report_runs import changed_copy, measured, recovered


def card_of(run: Path, origin: Origin, **changes: Any) -> str:
    manifest = read_manifest(run)
    return model_card(manifest | changes, cfsp.PruningPlan.load(run / "cfsp_plan.json"), origin)


def test_metadata_of_the_source_stay(run):
    expected = {
        "base_model": "someone/ancestor",
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "datasets": ["someone/corpus"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cfsp", "pruned", "chat"],
    }
    found = ModelCard.load(run / "README.md").data.to_dict()
    assert {key: found[key] for key in expected} == expected
    assert "widget" not in found


def test_numbers_have_their_conditions(run, text_file):
    entry = measured(str(text_file), 10.0, 12.5, seqlen=1024, bos=True)
    text = card_of(run, Origin("x", "owner/name", "owner/name"), perplexity=entry)
    name = f"| `{text_file.name}` | "  # no local path
    how = "12 windows of 1,024 tokens, with BOS, in float32; calibrated or trained on this text"
    row = f"{name}{how} | 10.00 | 12.50 |"
    assert row in text and "base_model: owner/name" in text


def test_card_says_what_was_done_and_on_which_text(run, text_file):
    text = (run / "README.md").read_text()
    for said in (
        "# my-model, pruned",
        "`my-model` (which was made from [someone/ancestor](https://huggingface.co/",
        "without 50.0% of FFN channels",
        f"Calibrated on {text_file.name} (8 windows)",
        "Repaired on the same text (ridge)",
        "is **flattering**",
        "trust_remote_code=True",
        "numbers of KV groups, or no attention",  # which bring code too
        "cfsp verify .",
        "the license of that model (`other`) applies",
    ):
        assert said in text
    for place in (run, text_file):
        assert str(place.parent) not in text  # the hub shows it to everybody


def test_what_made_the_model_before_made_this_one(run, text_file, tmp_path):
    again = tmp_path / "again"
    how = {"samples": 4, "seqlen": 32, "multiple": 8, "effort": "fast", "block_metric": "angular"}
    cfsp.prune(run, out=again, sparsity="20%", data=cfsp.Text("other", ["a river. " * 300]), **how)
    base, command = (read_manifest(again)[key] for key in ("base_model", "command"))
    assert command == "cfsp.prune('run', sparsity='20%', ...)"  # as Python takes it
    assert base["texts"] == [str(text_file)]
    assert base["made_from"] == read_manifest(run)["base_model"]
    card = (again / "README.md").read_text()
    assert f"`run` itself was calibrated or trained on {text_file.name}." in card
    entry = measured(str(text_file), 10.0, 12.5)
    card = card_of(again, Origin("x"), perplexity=entry)
    assert "; calibrated or trained on this text |" in card
    assert "| original | pruned |" in card and "| dense |" not in card


def test_card_without_repair_and_of_equal_widths(run):
    text = card_of(run, Origin("x"), repair={"steps": []}, files={})
    assert "Repaired" not in text and "repair: none" in text
    assert "trust_remote_code" not in text
    assert "base_model" not in text.split("---")[1] and "license" not in text.split("---")[1]
    assert "the license of that model applies" in text
    assert "| perplexity on |" not in card_of(run, Origin("x"), perplexity={})


def test_card_of_a_recovered_model(run, tmp_path):
    copy = changed_copy(run, tmp_path / "recovered", recovered)
    text = card_of(copy, origin_of(Checkpoint(run)))
    data = ModelCard(text).data
    assert data.base_model == "someone/ancestor" and data.license == "other"
    assert "# my-model, pruned and recovered" in text
    assert "## How it was pruned" in text and "## How it was recovered" in text
    assert "cfsp recover pruned --out recovered\n" in text


def test_the_demo_has_its_real_name(tiny_checkpoint, run):
    demo = origin_of(Checkpoint(tiny_checkpoint("llama"), label="demo"))
    assert demo.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = card_of(run, demo, base_model={"name": "demo"})
    assert "# HuggingFaceTB/SmolLM2-135M-Instruct, pruned" in text
    assert "license: apache-2.0" in text and "`demo`" not in text
    # Pruned again, it is made from what was made from the demo.
    text = card_of(run, demo, base_model={"name": "/somewhere/once"})
    assert "`once` (which was made from [HuggingFaceTB/" in text


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("owner/name", "owner/name"),
        ("owner/name@main", "owner/name@main"),
        ("owner/name@](x)", None),
        ("/home/me/models/name", None),
        ("/cache/models--owner--my-name/snapshots/abc123", "owner/my-name"),
        ("./name", None),
    ],
)
def test_hub_id_of_a_source(tiny_checkpoint, label, expected):
    assert origin_of(Checkpoint(tiny_checkpoint("llama"), label=label)).hub_id == expected


def test_a_path_of_another_directory_is_no_hub_id(run, tmp_path):
    """Its card knew better; a name that it has is one whatever is in this directory."""
    for name, expected in {"models/llama": None, "someone/ancestor": "someone/ancestor"}.items():
        named = changed_copy(
            run, tmp_path / Path(name).name, lambda m, name=name: m["base_model"].update(name=name)
        )
        assert origin_of(Checkpoint(named)).hub_id == expected
    # What is given now: a model that was only trained has no other name.
    trained = changed_copy(run, tmp_path / "trained", lambda m: m.pop("base_model"))
    assert origin_of(Checkpoint(trained, label="someone/trained")).hub_id == "someone/trained"


@pytest.mark.parametrize("card", ["", "no metadata", "---\n[\n---\n", "---\n- a\n---\n", "\0"])
def test_a_card_that_cannot_be_read_tells_nothing(source_with_card, tmp_path, card):
    copy = tmp_path / "copy"
    shutil.copytree(source_with_card, copy)
    (copy / "README.md").write_text(card)
    assert origin_of(open_checkpoint(copy)).metadata == {}
