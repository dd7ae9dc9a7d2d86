"""Sweeps: settings, resuming, tables, the Pareto front, and the report of a sweep."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import edit_tensors, entries, never, read_json
from cfsp import decide
from cfsp.checkpoint.output import _MACHINE
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality import evaluate
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.repair import ridge_pass
from cfsp.result.manifest import read_manifest
from cfsp.result.tables import pareto_front
from cfsp.settings import Budget, Compute
from cfsp.sweep import run
from cfsp.sweep.rows import loss_rise
from cfsp.sweep.settings import SweepSettings, method_named


@pytest.fixture(scope="module")
def sweep(model, text_file, tmp_path_factory):
    """The arguments of a sweep of two methods at two sparsities, and its directory."""
    out = tmp_path_factory.mktemp("sweep")
    # As of one that was killed while it wrote its settings; no process has this number.
    abandoned = out / f".sweep.json.partial-{_MACHINE}-{2**22 + 1}"
    abandoned.write_text("{")
    arguments = [
        "sweep", str(model), "--sparsity", "25%", "0.5",
        "--method", "cfsp", "cfsp-plain", "--multiple", "4", "--data", str(text_file),
        "--samples", "12", "--seqlen", "32", "--eval", str(text_file), "--windows", "2",
        "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert not abandoned.exists()
    return arguments, out


def test_every_method_makes_every_sparsity_at_the_same_size(sweep, text_file):
    _, out = sweep
    rows = read_json(out / "table.json")
    assert [row["name"] for row in rows] == [
        "dense", "cfsp-0.25", "cfsp-0.5", "cfsp-plain-0.25", "cfsp-plain-0.5",
    ]  # fmt: skip
    size = {row["name"]: row["parameters"] for row in rows}
    assert size["dense"] > size["cfsp-0.25"] == size["cfsp-plain-0.25"] > size["cfsp-0.5"]
    smallest = min(rows[2], rows[4], key=lambda row: row["loss_rise"])
    assert smallest["pareto_front"] == [str(text_file)] and rows[0]["loss_rise"] == 0
    for row in rows[1:]:
        directory = Path(row["directory"])
        plan = PruningPlan.load(directory / "cfsp_plan.json")
        assert plan.ffn_sparsity == pytest.approx(row["sparsity"], abs=0.05)
        assert not list(directory.glob("model*.safetensors"))
        measured = row["perplexity"][str(text_file)]
        assert measured.pop("value") > 1
        assert measured.items() <= rows[0]["perplexity"][str(text_file)].items()
        assert measured["windows"] == 2
        assert measured["tokens"] == 62
        compared = read_manifest(directory)["perplexity"][str(text_file)]
        assert set(compared) == {"before", "after", *measured}
    kept = [
        PruningPlan.load(out / f"{name}-0.5" / "cfsp_plan.json").units[0].kept
        for name in ("cfsp", "cfsp-plain")
    ]
    assert kept[0] != kept[1]
    table, compared = (out / "table.md").read_text().split("\n\nCompared with the dense model")
    caption, _, head, rule, *lines = table.splitlines()
    assert "| method | sparsity | KL | top-1 agreement, % |" in compared
    assert "asks" not in compared and "errors" not in compared  # there are none
    assert "2 windows of 32 tokens" in caption
    assert head.startswith("| method | sparsity | parameters removed |")
    assert rule.count("|") == head.count("|")
    methods = [line.split("|")[1].strip() for line in lines]
    assert methods == ["dense", *2 * ["cfsp"], *2 * ["cfsp-plain"]]


def test_it_asks_the_dense_model_once_and_compares_with_it(
    model, text_file, tmp_path, noted, monkeypatch, command
):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setattr("cfsp.quality.answers.ANSWER_TOKENS", 4)
    lines = [
        {"query": f"Question: {number}", "choices": ["one river", "two stones"], "gold": number % 2}
        for number in range(6)
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = [
        "sweep", model, "--sparsity", "25%", "50%", "--multiple", 4, "--data", text_file,
        "--samples", 8, "--seqlen", 32, "--eval", text_file, "--windows", 2, "--tasks", "piqa",
        "--limit", 4, "--task-data", tmp_path, "--answers", tmp_path / "chats.jsonl",
        "--set", "batch_windows=3", "--out", out,
    ]  # fmt: skip
    turns = [[{"role": "user", "content": f"river {number}"}] for number in range(2)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": x}) for x in turns))
    streamed = noted(evaluate, "streamed_sums", lambda *given, **_: given[-1])
    answering = noted(evaluate, "answers_of", lambda *given: given[-1])
    reading = noted(TaskRunner, "read_data", lambda runner: runner.selection.batch)
    told = command(*arguments).err
    assert told.count("8 windows calibrate and repair") == told.count("has little to spare") == 1
    of_dense = [label for label in streamed if label.startswith(str(model))]
    assert (len(of_dense), len(streamed)) == (2, 2 + 4)  # a text and the answers
    assert reading == [3]
    assert len(answering) == 3 and answering[0].startswith(str(model))
    dense, pruned, _more = read_json(out / "table.json")
    assert dense["comparison"] is None
    found = pruned["comparison"]
    divergence = found["texts"][str(text_file)]["divergence"]
    assert divergence["first"]["value"] == 0 < divergence["second"]["value"]
    assert found["second"] == pruned["directory"]
    assert found["tasks"]["piqa"]["documents"] == 4
    assert found["left_out"] == ["piqa"]  # a random model guesses
    tables = (out / "table.md").read_text()
    assert found["questions"] == 2 and found["answers"]["divergence"]["second"]["value"] > 0
    columns = "| KL | top-1 agreement, % | KL on answers | answers that loop, % |"
    assert f"| method | sparsity {columns}" in tables
    assert "Answers and tasks have standard errors. Tasks: the mean of those on which " in tables
    assert "Left out: piqa." in tables
    command("report", out, "--out", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "KL per token, nats" in html
    assert "KL per token on the original&#39;s answers, nats" in html
    assert "piqa, answers as the original" in html
    assert "the original does not beat a guess; not in the mean" in html
    # Other questions have no place beside these.
    turns.append(turns[0])
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": x}) for x in turns))
    assert "(other answers)" in command(*arguments, status=2).err
    (out / "dense.json").unlink()
    error = command(*arguments, status=2).err
    assert f"{out / 'cfsp-0.25'} was not measured as the dense model" in error


def test_a_sweep_does_not_go_on_with_another_text_or_other_weights(
    copied, text_file, tmp_path, command
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    argv = ["sweep", copied, "--sparsity", 0.5, "--method", "cfsp", "cfsp-plain", "--multiple", 4]
    argv += ["--data", text, "--seqlen", 32, "--eval", text_file, "--windows", 1, "--out", out]
    whole = text_file.read_text()[:12_000]
    text.write_text(whole)
    command(*argv)
    shutil.rmtree(out / "cfsp-plain-0.5")
    for other in (whole[3_000:], whole[3_000:] + whole[:3_000]):  # of fewer windows, and of as many
        text.write_text(other)
        error = command(*argv, status=2).err
        assert "holds a sweep by other settings" in error and "other calibration text); c" in error
    text.write_text(whole)
    edit_tensors(copied / "model.safetensors", lambda found: found["model.norm.weight"].add_(0.1))
    (out / "dense.json").unlink()
    error = command(*argv, status=2).err
    assert "other weights, config or tokenizer); choose another --out" in error
    assert not (out / "dense.json").exists()  # it was told before the work


def test_a_sweep_goes_on_where_it_stopped(sweep, command):
    arguments, out = sweep
    before = (out / "table.json").read_bytes()
    untouched = (out / "cfsp-0.25" / "cfsp.json").stat().st_mtime_ns
    shutil.rmtree(out / "cfsp-plain-0.25")
    (out / ".working").mkdir()
    (out / ".working" / "half").write_text("left by a kill")
    assert main(arguments) == 0
    assert (out / "table.json").read_bytes() == before
    assert (out / "cfsp-0.25" / "cfsp.json").stat().st_mtime_ns == untouched
    assert not (out / ".working").exists()
    error = command(*arguments, "--seed", 1, status=2).err
    assert "holds a sweep by other settings" in error and "sweep.json: other seed, " in error
    assert error.count("\n") == 1


def test_a_sparsity_more_is_one_model_more(sweep, tmp_path, command):
    arguments, whole = sweep
    out = shutil.copytree(whole, tmp_path / "out")
    again = [*arguments[:-1], out]
    manifest = (out / "cfsp-0.5" / "cfsp.json").read_bytes()
    more = again.index("0.5") + 1
    asked = [*again[:more], "0.75", *again[more:]]
    assert "can be removed" in command(*[*again[:more], "0.99", *again[more:]], status=2).err
    command(*asked)
    before, now = ({r["name"]: r for r in read_json(d / "table.json")} for d in (whole, out))
    assert now.keys() - before.keys() == {"cfsp-0.75", "cfsp-plain-0.75"}
    assert [now[name]["perplexity"] for name in before] == [
        r["perplexity"] for r in before.values()
    ]
    assert (out / "cfsp-0.5" / "cfsp.json").read_bytes() == manifest
    assert read_json(out / "sweep.json")["sparsity"] == [0.25, 0.5, 0.75]
    command(*again)  # what was asked for before is there still
    assert (out / "table.md").read_bytes() == (whole / "table.md").read_bytes()


def test_one_pass_repairs_all_models_and_a_killed_sweep_needs_no_other(
    sweep, model, text_file, tmp_path, command, monkeypatch, noted
):
    arguments, whole = sweep
    out = tmp_path / "out"
    again = [*arguments[:-1], out]
    wanted = noted(decide, "choose_and_repair", lambda *given: len(given[-1]))
    noted(run, "compare", lambda *_: None, dies_at=2)
    command(*again, status=130)
    assert wanted == [2]  # what `cfsp-plain` makes is not repaired
    assert {"cfsp-0.25", "cfsp-plain-0.5.work"} < entries(out)
    monkeypatch.setattr(ridge_pass, "observe", never)
    command(*again)
    assert entries(out) == entries(whole)
    alone, asked = tmp_path / "alone", ["--sparsity", 0.5, "--multiple", 4, "--data", text_file]
    monkeypatch.undo()
    command("prune", model, *asked, "--samples", 12, "--seqlen", 32, "--out", alone)
    made, expected = (read_manifest(each) for each in (out / "cfsp-0.5", alone))
    assert made["repair"] == expected["repair"]
    assert made["files"]["model.safetensors"] == expected["files"]["model.safetensors"]


def test_passes_are_kept_beside_what_is_still_to_be_made(
    sweep, tmp_path, command, monkeypatch, noted
):
    """Of a list that became longer, or where one model was deleted, the last may be there."""
    arguments, whole = sweep
    out = shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(out / "cfsp-0.25")
    again = [*arguments[:-1], out]
    noted(run, "compare", lambda *_: None, dies_at=1)
    command(*again, status=130)
    monkeypatch.setattr(ridge_pass, "observe", never)
    command(*again)
    assert entries(out) == entries(whole)


@pytest.mark.parametrize("at", [0, 2])
def test_a_killed_sweep_goes_on_with_a_longer_list(sweep, tmp_path, command, noted, at):
    arguments, _ = sweep
    out = tmp_path / "out"
    again = [*arguments[:-1], out]
    noted(run, "compare", lambda *_: None, dies_at=1)
    command(*again, status=130)
    assert [path for path in entries(out) if path.endswith(".work")]
    again.insert(again.index("--sparsity") + 1 + at, 0.75)
    command(*again)
    assert not [path for path in entries(out) if path.endswith(".work")]
    assert {"cfsp-0.25", "cfsp-0.5", "cfsp-0.75"} < entries(out)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_holds_exactly_what_nothing_beats(points):
    front = pareto_front(points)
    assert any(front)
    for point, best in zip(points, front, strict=True):
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert best != beaten


def test_every_method_has_every_sparsity():
    methods = ("cfsp-plain", "cfsp-published", "attention")
    asked = SweepSettings("m", (0.5, 0.25), ("t",), methods, multiple=8)
    points = asked.points(Compute())
    assert [point.name for point in points] == [
        f"{method}-{sparsity}" for method in methods for sparsity in (0.5, 0.25)
    ]
    near = replace(asked, sparsity=(0.12341, 0.12342)).points(Compute())
    assert [point.name for point in near[:2]] == ["cfsp-plain-0.12341", "cfsp-plain-0.12342"]
    budgets = [point.settings.budget for point in points]
    assert budgets[4] == Budget(0.5, multiple=8, parts=("attention",))
    assert budgets[2].multiple == 8  # whatever the method
    without = replace(asked, multiple=None).points(Compute())
    assert without[2].settings.budget == Budget(0.5, multiple=128)
    assert [points[i].settings.repair for i in (0, 4)] == ["none", "ridge"]
    assert points[2].settings.criterion.channel_metric == "activation"
    with pytest.raises(UsageError, match="give --eval"):
        replace(asked, eval=())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--windows", "9999"], "9999 are needed"),
        (["--sparsity", "0.99"], "can be removed"),
        (["--sparsity", "1.5"], "must be in [0, 1)"),
        (["--sparsity", "0.5", "0.5"], "every method and every sparsity once"),
        (["--device", "nowhere"], "nowhere"),
        (["--samples", "0"], "--samples must be at least 1 and"),
        (["--method", "ffn,blocks"], "several share one target"),
    ],
)
def test_all_that_is_named_is_checked_before_anything_is_computed(
    model, text_file, tmp_path, monkeypatch, command, more, message
):
    for name in ("decide_all", "prune_checkpoint"):
        monkeypatch.setattr(f"cfsp.sweep.run.{name}", never)
    monkeypatch.setattr(evaluate, "streamed_sums", never)
    asked = ["--sparsity", 0.5, "--multiple", 4, "--seqlen", 32, "--data", text_file]
    asked += ["--eval", text_file, "--out", tmp_path / "made" / "out"]
    error = command("sweep", model, *asked, *more, status=2).err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("older", ["cfsp-0.25", None])
def test_only_what_was_measured_alike_is_compared(sweep, text_file, command, older):
    """A model, or the dense one, that was measured otherwise: by another version, perhaps."""
    arguments, out = sweep
    error = command(*arguments, "--dtype", "bfloat16", status=2).err
    assert "something else than was asked for now (other dtypes)" in error
    path = out / "dense.json" if older is None else out / older / "cfsp.json"
    whole = path.read_text()
    found = json.loads(whole)
    if older is None:
        damaged = {**found, "models": [{**found["models"][0], "perplexity": {"a": 1}}]}
        path.write_text(json.dumps(damaged))
        error = command(*arguments, status=2).err
        assert f"{path} is damaged" in error and "; delete it and run the sweep again" in error
        path.write_text(json.dumps({**found, "models": []}))
        assert f"{path} exists and holds something else" in command(*arguments, status=2).err
        path.unlink()
        error = command(*arguments, "--dtype", "bfloat16", status=2).err
    else:
        for damaged in (
            json.dumps({**found, "perplexity": None}),
            json.dumps({**found, "perplexity": {"a": {"before": 1}}}),
            json.dumps({**found, "comparison": [1]}),
            json.dumps({**found, "comparison": None}),
            json.dumps({**found, "comparison": {}}),
            json.dumps({**found, "comparison": {**found["comparison"], "left_out": None}}),
            "{",
        ):
            path.write_text(damaged)
            error = command(*arguments, status=2).err
            assert f"{path} is damaged" in error
            assert f"; delete {path.parent} and run the sweep again" in error
        (measured,) = found["perplexity"].values()
        path.write_text(json.dumps({**found, "perplexity": {"another": measured}}))
        error = command(*arguments, status=2).err
        assert f"{out / 'cfsp-0.25'} was not measured as the dense model" in error
        found["sweep"]["measured"] = "otherwise"
        path.write_text(json.dumps(found))
        error = command(*arguments, status=2).err
    assert f"{out / 'cfsp-0.25'} was not measured as the dense model" in error
    path.write_text(whole)


def test_loss_rise_is_in_nats():
    before = {"a": 10.0, "b": 20.0}
    assert loss_rise({"a": 20.0, "b": 20.0}, before) == pytest.approx(math.log(2) / 2)


def test_a_method_is_a_name_or_a_part():
    assert method_named("cfsp-published") == "cfsp-published"
    assert method_named("kv,ffn") == "ffn,kv"
    with pytest.raises(UsageError, match=r"unknown method 'fnn'.*known are: cfsp, .*--parts"):
        method_named("fnn")


def test_parts_are_pruned_as_alone(model, text_file, tmp_path, command):
    out, methods, shares = tmp_path / "out", ["kv", "blocks"], [0.3, 0.5]
    asked = ["--data", text_file, "--samples", 12, "--seqlen", 32, "--multiple", 8]
    measured = ["--eval", text_file, "--windows", 1, "--method", *methods]
    said = command("sweep", model, *asked, *measured, "--sparsity", *shares, "--out", out).err
    assert "going on" not in said  # with what it made itself
    _dense, *rows = read_json(out / "table.json")
    assert [row["method"] for row in rows] == [part for part in methods for _ in shares]
    for part, share in product(methods, shares):
        alone = tmp_path / f"{part}-{share}"
        command("prune", model, *asked, "--parts", part, "--sparsity", share, "--out", alone)
        made, expected = map(read_manifest, (out / alone.name, alone))
        assert made["repair"] == expected["repair"]
        assert made["files"] == expected["files"]
