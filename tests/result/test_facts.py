"""The facts of a result: numbers and their conditions, names, how it was made; damaged ones."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cfsp.architecture.block_names import counted
from cfsp.errors import CheckpointError, ReportError
from cfsp.quality.paired import Number
from cfsp.result.card import Origin, model_card
from cfsp.result.facts import (
    NOTHING,
    RATE,
    SPEED,
    Conditions,
    Fact,
    joined,
    perplexities,
    size_facts,
    texts_that_made,
    what_went,
)
from cfsp.result.making import making, steps_in_words, texts_in_words
from cfsp.result.manifest import read_manifest
from cfsp.result.names import is_hub_id, public_command, public_name, short_names
from cfsp.result.page.chart import pareto_chart
from cfsp.result.page.page import headlines, sections, write_report
from cfsp.result.runs import read_run
from report_runs import DIVERGED, FITTED, changed_copy, measured, recovered

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def step(name: str, **kept: bool) -> dict[str, Any]:
    """Return a step as a manifest has it, by block: of one that lost nothing `idle` is said."""
    blocks = [
        {"kept": is_kept, "error_before": name_of != "idle", "error_after": 0.5}
        for name_of, is_kept in kept.items()
    ]
    return {"name": name, "blocks": blocks}


def test_steps_in_words():
    steps = [
        step("ridge", first=True, second=False),
        step("sequential", first=False, second=False),
        step("gaps", idle=False, first=True),
        {"name": "gaps", "blocks": [None, FITTED, DIVERGED]},
    ]
    words = (
        "ridge (error of outputs 1.000 to 0.750, rejected in block 1), sequential (error of "
        "hidden states 1.000 to 1.000, rejected in every block), gaps (error of hidden states "
        "1.000 to 0.500), gaps (error of hidden states 0.438 to 0.312, rejected in block 2)"
    )
    assert steps_in_words(steps) == words


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"windows": 12, "seqlen": 1024, "bos": True}, "12 windows of 1,024 tokens, with BOS"),
        ({"windows": 1, "seqlen": 512, "bos": False}, "1 window of 512 tokens, without BOS"),
    ],
)
def test_conditions_in_words(entry, words):
    entry |= {"tokens": 1023, "evaluation_part": False, "tokens_digest": "", "dtype": "float32"}
    conditions = Conditions.of("news", entry)
    assert str(conditions) == f"{words}, in float32"
    assert conditions == Conditions.of("news", {"value": 3.0, **entry})
    others = {"windows": 13, "seqlen": 2048, "bos": not entry["bos"], "tokens_digest": "of others"}
    for other in ({key: value} for key, value in others.items()):
        assert conditions != Conditions.of("news", entry | other)


@pytest.mark.parametrize(
    ("text", "evaluation_part", "words"),
    [
        ("mine.txt", False, "; calibrated or trained on this text"),
        ("mixed", True, "; calibrated or trained on other parts of this text"),
        ("mixed/books", True, "; calibrated or trained on other parts of this text"),
        ("python-docs", True, "; other calibrated or trained on other parts of this text"),
        ("c4", True, ""),
        ("./mine.txt", False, "; calibrated or trained on this text"),
        ("mine.txt:title", False, ""),
        ("wikitext2", True, "; other calibrated or trained on this text"),
    ],
)
def test_conditions_say_whether_the_text_made_the_model(text, evaluation_part, words):
    entry = {"tokens": 9, "windows": 1, "seqlen": 10, "bos": False}
    entry |= {"evaluation_part": evaluation_part, "tokens_digest": "", "dtype": "float32"}
    manifest = {"calibration": {"sources": {"mixed/books": 3, "mine.txt": 5}}}
    test_part = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
    trained = manifest | {"recovery": {"data": {"sources": {"python-docs": 2, test_part: 1}}}}
    conditions = Conditions.of(text, entry)
    told = conditions.beside({"one": manifest, "other": trained})
    assert told == f"1 window of 10 tokens, without BOS, in float32{words}"


def test_a_recovery_is_beside_its_pruning():
    """Of the same conditions; in another dtype it is another number."""
    pruned, trained = measured("news", 20.0, 25.0), measured("news", 25.0, 22.0)
    manifest = {"criterion": {}, "perplexity": pruned, "recovery": {"perplexity": trained}}
    (found,) = perplexities(manifest).values()
    assert found == {"dense": 20.0, "pruned": 25.0, "recovered": 22.0}
    pruned["news"]["dtype"] = "bfloat16"
    assert [*map(len, perplexities(manifest).values())] == [2, 2]


def test_one_of_a_thing_is_said_as_one():
    assert counted(1, "windows") == "1 window"
    assert counted(2000, "steps") == "2,000 steps"
    texts = {"sources": {"c4": 64, "/mine/own.txt": 1}}
    assert texts_in_words(texts) == "c4 (64 windows), own.txt (1 window)"


def test_names_are_short_and_stay_apart():
    alike = ["/x/a/test.txt", "/y/a/test.txt"]
    assert list(short_names(alike).values()) == ["x/a/test.txt", "y/a/test.txt"]
    assert list(short_names(["/x/a/b.txt", "c4"]).values()) == ["a/b.txt", "c4"]
    assert list(short_names(["/x/small", "/x/large"], least=1).values()) == ["small", "large"]
    assert short_names(["owner/name", "python-docs"], least=1)["owner/name"] == "owner/name"


def test_a_directory_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/other") and not is_hub_id("models/name")


def test_no_path_of_a_command_is_public():
    typed = "cfsp prune meta/name --data mixed/books --data '/my disk/an a.jsonl:x' --out=../b/c"
    public = "cfsp prune meta/name --data mixed/books --data 'an a.jsonl:x' --out=c"
    assert public_command(typed) == public
    typed = "cfsp prune meta/name --data /home/me/a,b.txt --out clients/acme"
    assert public_command(typed) == "cfsp prune meta/name --data a,b.txt --out acme"
    words = ["cfsp", "prune", "/home/o'brien/m", "--data", "/my disk/it's.txt", "--set"]
    words += ["statistics=/home/me/S", "--out", "/home/me/o b"]
    public = shlex.join([*words[:2], "m", "--data", "it's.txt", "--set", "statistics=S"])
    assert public_command(shlex.join(words)) == f"{public} --out 'o b'"
    typed = "cfsp prune /home/me/run=3/m --data /home/a=b/y.txt --out=/home/me/a=b/c"
    assert public_command(typed) == "cfsp prune m --data y.txt --out=c"
    assert public_command("cfsp prune a/b --out a/b=c/d") == "cfsp prune a/b --out d"
    assert public_command("cfsp prune /a/b it's") == shlex.join(["cfsp", "prune", "b", "it's"])
    for name in ("/home/me/model", "/home/o'brien/model", "/home/o'b\"x/y\\z/model"):
        assert public_command(f"cfsp.recover({name!r}, ...)") == "cfsp.recover('model', ...)"
    assert public_name("mixed/books") == "mixed/books" and public_name("/a/b.txt") == "b.txt"


def test_numbers_of_the_manifest_are_in_the_facts(run, text_file):
    facts = read_run(run)
    assert facts.manifest["command"] == "cfsp prune my-model --sparsity 0.5 --out run"  # no path
    assert facts.manifest["out"] == "run"
    tables = sections([facts])
    size = {row.name: row.cells for row in tables["Size"]}
    counts = [facts.manifest[key] for key in ("parameters_before", "parameters_after")]
    assert [cell.value for cell in size["parameters"]] == [f"{count:,}" for count in counts]
    assert [cell.value for cell in size["FFN channels"]] == ["288", "144"]
    assert size["FFN channels"][1].note == f"{MINUS}50.0%"
    value = facts.manifest["perplexity"][str(text_file)]
    (row,) = tables["Perplexity"]
    assert [c.value for c in row.cells] == [f"{value[side]:.2f}" for side in ("before", "after")]
    assert row.name.endswith(f"/{text_file.name}") and row.hint == "62 predicted tokens"
    assert row.detail.endswith("without BOS, in float32; calibrated or trained on this text")


def test_every_part_that_lost_something_is_a_fact():
    part = {"before": [8, 8], "after": [4, 4], "sparsity": 0.5, "lost_output": [0.1, 0.2]}
    manifest = {
        "parameters_before": 1000,
        "parameters_after": 400,
        "model_sparsity": 0.6,
        "ffn_sparsity": 0.25,
        "ffn_channels": {"before": 24, "after": 12},
        "blocks_before": 3,
        "removed_blocks": [1],
        "removed_attentions": [2],
        "kv_groups": part,
        "experts": part,
    }
    assert [(fact.name, *fact.row) for fact in size_facts(manifest)] == [
        ("parameters", "1,000", "400", f"{MINUS}60.0%"),
        ("blocks", "3", "2", f"{MINUS}33.3%"),
        ("attention layers removed", NOTHING, "1", ""),
        ("FFN channels", "24", "12", f"{MINUS}50.0%"),
        ("KV groups", "16", "8", f"{MINUS}50.0%"),
        ("experts", "16", "8", f"{MINUS}50.0%"),
    ]
    went = "25.0% of FFN parameters, 50.0% of KV groups, 4 of the 8 experts of each block, 60.0% of"
    assert f", in all {went} parameters" in what_went(manifest)
    assert what_went(manifest).startswith("block 1 and the attention layer of block 2")
    assert size_facts({}) == []


def test_what_nothing_follows_is_not_told(run):
    manifest = read_manifest(run)
    for parts, told in ((["ffn"], True), (["kv"], True), (["blocks"], False)):
        criterion = manifest["criterion"] | {"parts": parts}
        (made,) = making(manifest | {"criterion": criterion})
        assert ("channels by" in made.facts, "widths" in made.facts) == (told, parts == ["ffn"])


def test_inspect_card_and_page_tell_the_same_of_the_making(run, tmp_path, command):
    def by_a_goal(manifest: dict[str, Any]) -> None:
        recovered(manifest)
        manifest["goal"] = {"goal": "target_params", "asked": 0.8, "tried": []}

    copy = changed_copy(run, tmp_path / "copy", by_a_goal)
    manifest = read_manifest(copy)
    told = command("inspect", copy).out
    pruned, trained = making(manifest)
    assert pruned.facts["goal"] == "--target-params 0.8"
    assert (pruned.verb, trained.verb) == ("pruned", "recovered")
    # What was asked for is the goal.
    assert pruned.facts["chosen"] == "50.0% of FFN channels" and "asked for" not in pruned.facts
    assert pruned.facts["repair"].startswith("ridge (error of outputs")
    assert "teacher" not in trained.facts
    for name, value in {**pruned.facts, **trained.facts}.items():
        if name not in ("time", "memory"):  # `inspect` does not tell what it took
            assert f"\n{name:<18} {value}\n" in told
    assert "123.25 recovered" in told
    for place in (run, tmp_path):
        assert str(place) not in json.dumps([pruned.facts, trained.facts])


def test_a_text_that_only_repaired_is_on_record(
    model, run, text_file, other_text_file, tmp_path, command
):
    plan, few = run / "cfsp_plan.json", ("--samples", 4, "--seqlen", 32)
    command(
        "prune", model, "--plan", plan, "--data", other_text_file, *few, "--out", tmp_path / "a"
    )
    manifest, card = read_manifest(tmp_path / "a"), (tmp_path / "a" / "README.md").read_text()
    assert texts_that_made(manifest) == {str(text_file), str(other_text_file)}
    said = f"{other_text_file.name} (4 windows)"
    assert f"- Repaired on {said} (ridge)" in card
    assert f"\nrepair text        {said} of 32 tokens\n" in command("inspect", tmp_path / "a").out
    assert "- Repaired on the same text (ridge)" in (run / "README.md").read_text()
    # Those that repair the block beside a gap are more than those that chose it.
    few = ("--samples", 16, "--seqlen", 32, "--out", tmp_path / "b")
    command("prune", model, "--parts", "blocks", "--remove", 1, "--data", text_file, *few)
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"- Repaired on {text_file.name} (16 windows) (gaps)" in card


def test_what_was_only_trained_is_not_called_pruned(run, tmp_path, command):
    def trained(manifest: dict[str, Any]) -> None:
        recovered(manifest)
        for key in ("criterion", "base_model", "ffn_sparsity", "perplexity"):
            del manifest[key]
        manifest["model_type"] = "qwen2_vl"
        (of_text,) = manifest["recovery"]["perplexity"].values()
        of_text["before"] = 246.5

    copy = changed_copy(run, tmp_path / "copy", trained)
    manifest = read_manifest(copy)
    card = model_card(manifest, None, Origin("mine"))
    assert "| dense | recovered |" in card and "| 246.50 | 123.25 |" in card
    assert "pruned" not in card.partition("## How to load it")[0]
    assert "import AutoModelForImageTextToText, AutoProcessor" in card
    assert "trained on 20 windows, drawn from" in card
    told = command("inspect", copy).out
    assert "not by cfsp" in told and "246.50 dense, 123.25 recovered" in told
    assert "\nrecovered by" in told
    command("report", copy, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h1>the original, recovered</h1>" in page and "The weakest parts" not in page
    assert f"{TIMES} 0.50" in page


def test_a_ratio_is_of_what_was_measured_together():
    fact = Fact(SPEED, "decode", RATE)
    first = [replace(fact, before=Number(100.0)), replace(fact, after=Number(160.0), ratio=1.6)]
    (found,) = joined(first)
    assert found.row == ("100.0", "160.0", f"{TIMES} 1.60")
    # The same workload, on a machine that was too busy for a ratio.
    later = [replace(fact, before=Number(50.0)), replace(fact, after=Number(45.0))]
    (found,) = joined([*first, *later])
    assert found.row == ("50.0", "45.0", "")


# Perplexities under different conditions.


def test_only_equal_conditions_are_compared(run, tmp_path):
    """The dense model at 512 tokens and a recovered one at 1024 stand in rows of their own."""

    def recovered_at_1024(manifest: dict[str, Any]) -> None:
        manifest["perplexity"] = measured("news", 79.19, 111.86)
        recovered(manifest)
        manifest["recovery"]["perplexity"] = measured("news", 50.0, 34.21, seqlen=1024)

    pruned = changed_copy(
        run, tmp_path / "pruned", lambda m: m.update(perplexity=measured("news", 79.19, 111.86))
    )
    other = changed_copy(run, tmp_path / "recovered", recovered_at_1024)
    runs = [read_run(pruned), read_run(other)]
    rows = sections(runs)["Perplexity"]
    values = [cell.value for row in rows for cell in row.cells]
    assert values == ["79.19", "111.86", NOTHING, NOTHING, NOTHING, "34.21"]
    assert [cell.note for row in rows for cell in row.cells] == ["", f"{TIMES} 1.41", *4 * [""]]
    assert [row.detail for row in rows] == [
        f"12 windows of {tokens} tokens, without BOS, in float32; recovered calibrated or trained "
        "on this text"
        for tokens in ("512", "1,024")
    ]
    assert pareto_chart(runs) is None
    assert not [line for line in headlines(runs[1]) if line.noun.startswith("perplexity")]
    (line,) = [line for line in headlines(runs[0]) if line.noun == "perplexity, news"]
    assert line.value == f"{TIMES} 1.41"
    assert line.detail == "79.19 to 111.86, 12 windows of 512 tokens, without BOS, in float32"


Change = Callable[[dict[str, Any]], object]


def repaired_with(entry: Any) -> Change:
    steps = [{"name": "gaps", "blocks": [FITTED, entry, FITTED]}]
    return lambda manifest: manifest.update(repair={"steps": steps})


DAMAGED = "COPY/cfsp.json is damaged ("


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("ffn_channels"), f"{DAMAGED}KeyError('ffn_channels')); prune the model"),
        (lambda m: m.update(parameters_after="many"), "'many'"),
        (lambda m: m.update(base_model=[]), "'list' object"),
        (lambda m: m.update(perplexity={"x": {"before": 1}}), "'tokens'"),
        (lambda m: m.update(perplexity=measured("x", 1, 2) | {"y": 3}), "'int' object"),
        (lambda m: m.update(perplexity=measured("x", 1, math.nan)), DAMAGED),
        (lambda m: m.update(comparison={"kept": {"second": {"value": "x"}}}), "'x'"),
        (lambda m: m.update(recovery={"history": [{"step": 0}]}), "'held_out'"),
        (lambda m: m.update(speed={"models": [{}]}), "'model'"),
        (lambda m: m.update(repair={"steps": 3}), "'int' object"),
        (lambda m: m.update(repair={"steps": [3]}), "'int' object"),
        (lambda m: m.update(repair={"steps": [{"name": "x"}]}), "'blocks'"),
        (repaired_with(0.5), DAMAGED),
        (repaired_with({}), DAMAGED),
        (repaired_with(FITTED | {"error_before": None}), DAMAGED),
        (repaired_with(FITTED | {"error_after": "small"}), DAMAGED),
        (repaired_with(DIVERGED | {"block": 1}), DAMAGED),
    ],
)
def test_damaged_manifests_are_refused(run, tmp_path, change, message):
    copy = changed_copy(run, tmp_path / "copy", change)
    with pytest.raises((CheckpointError, ReportError)) as caught:
        write_report([copy], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    said = str(caught.value)
    assert "\n" not in said and message in said.replace(str(copy), "COPY")
