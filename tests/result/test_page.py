"""The report: what it gathers, how it draws, what it refuses, and that nothing foreign gets in."""

import json
import math
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.cli import main
from cfsp.errors import OutputError, ReportError
from cfsp.result.facts import NOTHING
from cfsp.result.manifest import add_to_manifest, read_manifest
from cfsp.result.page.chart import pareto_chart, round_scale
from cfsp.result.page.page import group_runs, page_file, write_report
from cfsp.result.runs import (
    AGREEMENT,
    ANSWERS,
    PAIRS,
    _comparison_facts,
    read_run,
    read_runs,
    side_by_side,
)
from conftest import REPOSITORY
from report_runs import changed_copy, measured, recovered

TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = '"></script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'


class _Page(HTMLParser):
    """Collects what a browser would execute or load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def rendered(runs: list[Path], tmp_path: Path, *results: Path) -> str:
    out = tmp_path / "report.html"
    write_report([*runs, *results], out)
    return out.read_text()


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_page_is_complete_in_itself(run, tmp_path):
    text = rendered([run], tmp_path)
    page = _Page(text)
    loading = {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    assert not [tag for tag, _ in page.tags if tag in loading]
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [attrs for _, attrs in page.tags if "style" in attrs]  # the policy forbids them
    assert "@import" not in text and "url(" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy


def test_every_chart_has_words_and_a_table(run, tmp_path):
    text = rendered([run], tmp_path)
    page = _Page(text)
    plots = [attrs for tag, attrs in page.tags if attrs.get("class") == "plot"]
    assert len(plots) == 1  # blocks
    assert all(plot["tabindex"] == "0" and plot["aria-label"] for plot in plots)
    images = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(images) == 2  # for a wide window, and for a phone
    assert all(image["role"] == "img" and len(image["aria-label"] or "") > 40 for image in images)
    assert text.count("<figure>") == text.count("<details>") == 1


def test_recovered_run_shows_its_own_perplexity_and_curve(run, tmp_path):
    copy = changed_copy(run, tmp_path / "recovered", recovered)
    facts = read_run(copy)
    (fact,) = facts.under("Perplexity")
    dense = next(iter(facts.manifest["perplexity"].values()))["before"]
    assert fact.after == (123.25, None) and fact.before == (dense, None)
    assert "<h1>my-model, pruned and recovered</h1>" in rendered([copy], tmp_path)
    text = rendered([run, copy], tmp_path)
    for held_out in (3.7257, 3.5041, 3.4054):
        assert f"<td>{held_out:.4f}</td>" in text
    assert "cfsp recover pruned --out recovered" in text
    assert "How recovery went" in text


def test_runs_of_different_models_get_tables_of_their_own(run, tmp_path):
    def of_another(manifest: dict[str, Any]) -> None:
        manifest["base_model"] |= {"name": "another", "fingerprint": "0" * 32}

    other = changed_copy(run, tmp_path / "other", of_another)
    (other / "cfsp_plan.json").unlink()
    text = rendered([run, other], tmp_path)
    assert text.count("What went in and what came out:") == 2
    assert text.count('class="section"') == 4
    # Of models that were only trained nobody knows whether they were one.
    trained = [
        changed_copy(run, tmp_path / name, lambda manifest: manifest.pop("base_model"))
        for name in ("one", "two")
    ]
    assert [len(group.runs) for group in group_runs(read_runs([run, other, *trained]))] == [1] * 4


def test_foreign_text_cannot_become_markup(run, tmp_path):
    """Neither by a name, a command, a text, a version, a step of repair nor a directory."""

    def poison(manifest: dict[str, Any]) -> None:
        manifest["base_model"]["name"] = manifest["command"] = HOSTILE
        manifest["perplexity"] = measured(HOSTILE, 1.0, 2.0)
        manifest["versions"][HOSTILE] = HOSTILE
        manifest["repair"]["steps"][0]["name"] = HOSTILE

    copy = changed_copy(run, tmp_path / HOSTILE.replace("/", ""), poison)
    text = rendered([copy], tmp_path)
    assert text.count("hacked") > 10
    page = _Page(text)
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


@pytest.mark.parametrize("highest", [1e-9, 0.0007, 0.47, 1.0, 2.5, 1536.0, 3e9])
def test_scales_reach_their_values_with_round_ticks(highest):
    scale = round_scale([0.0, highest])
    assert scale(0.0) == 0.0 and 0.4 < scale(highest) <= 1.0
    ticks = scale.ticks(4)
    assert 3 <= len(ticks) <= 10 and ticks[0] == 0.0
    between = round_scale([highest, highest * 1.3])
    assert between.low <= highest and between.high >= highest * 1.3
    assert 0.0 <= round(round_scale([highest])(highest), 6) <= 1.0
    for outside in (math.nan, math.inf, -0.1 * highest):
        with pytest.raises(ValueError, match="is no number from 0 to"):
            scale(outside)


def timed(prompt: int, ratios: dict[str, float]) -> dict[str, Any]:
    """Return what bench prints of models that are so many times as fast as the first."""
    figures = {
        name: {"tokens_per_second": 10.0 * ratio, "ratio": ratio, "ideal_ratio": 2.0}
        for name, ratio in ratios.items()
    }
    return {
        "models": [
            {
                "model": name,
                "fingerprint": name,
                "workloads": [
                    {"batch": 1, "prompt": prompt, "new_tokens": n, "prefill": own, "decode": own}
                    for n in (8, 32)
                ],
            }
            for name, own in figures.items()
        ]
    }


def weights_of(run: Path) -> list[str]:
    """Return the fingerprints of what a run was made from, and of the run."""
    return [read_manifest(run)["base_model"]["fingerprint"], open_checkpoint(run).fingerprint]


def test_results_of_eval_and_bench_are_added(run, tmp_path):
    how = {"tokens": 100, "windows": 2, "seqlen": 51, "bos": True, "evaluation_part": False}
    how |= {"tokens_digest": "", "dtype": "float32"}
    models = weights_of(run)
    measured = [
        {
            "model": name,
            "fingerprint": name,
            "perplexity": {"news": {"value": 20.0 + 5 * i, **how}},
            "tasks": {"piqa": {"acc": 0.61 - 0.1 * i, "acc_stderr": 0.011, "documents": 100}},
        }
        for i, name in enumerate(models)
    ]
    evaluation, bench = tmp_path / "eval.json", tmp_path / "bench.json"
    evaluation.write_text(json.dumps({"models": measured}))
    bench.write_text(json.dumps(timed(64, dict(zip(models, (1.0, 1.9), strict=True)))))
    words = words_of(rendered([run], tmp_path, evaluation, bench))
    assert (
        f"perplexity, news 2 windows of 51 tokens, with BOS, in float32 20.00 25.00 {TIMES} 1.25"
        in words
    )
    assert re.search(r"piqa, acc 100 documents 61\.0 51\.0 . 1\.1", words)
    # On other documents it is another number.
    measured[1]["tasks"]["piqa"] |= {"acc": 0.7, "documents": 1}
    (tmp_path / "few.json").write_text(json.dumps({"models": measured[1:]}))
    both = words_of(rendered([run], tmp_path, evaluation, tmp_path / "few.json"))
    assert re.search(rf"piqa, acc 1 document {NOTHING} 70\.0 . 1\.1", both)
    assert re.search(r"piqa, acc 100 documents 61\.0 51\.0 . 1\.1", both)
    # And so it is of one that computes in another dtype.
    in_half = {"news": {"value": 21.0, **how, "dtype": "bfloat16"}}
    half = {"models": [{**measured[1], "perplexity": in_half}]}
    (tmp_path / "half.json").write_text(json.dumps(half))
    apart = words_of(rendered([run], tmp_path, evaluation, tmp_path / "half.json"))
    shape = "perplexity, news 2 windows of 51 tokens, with BOS, in"
    assert f"{shape} float32 20.00 25.00 {TIMES} 1.25" in apart
    assert f"{shape} bfloat16 {NOTHING} 21.00" in apart
    # The original may have been measured alone.
    for number, model in enumerate(measured):
        (tmp_path / f"{number}.json").write_text(json.dumps({"models": [model]}))
    apart = words_of(rendered([run], tmp_path, tmp_path / "1.json", tmp_path / "0.json"))
    assert (
        f"perplexity, news 2 windows of 51 tokens, with BOS, in float32 20.00 25.00 {TIMES} 1.25"
        in apart
    )
    assert words.count("prefill, batch 1, prompt 64") == 1
    for new_tokens in (8, 32):
        shape = f"batch 1, prompt 64, {new_tokens} new tokens"
        assert f"decode, {shape} 10.0 19.0 {TIMES} 1.90" in words


def test_timings_of_other_machines_share_no_row(run, tmp_path):
    models = weights_of(run)
    for device in ("cpu", "cuda:0"):
        found = timed(64, dict(zip(models, (1.0, 1.9), strict=True)))
        for model in found["models"]:
            model |= {"dtype": "bfloat16", "device": device, "threads": 2}
            for workload in model["workloads"]:
                workload["prefill"] = workload["prefill"] | {"too_busy": device == "cpu"}
        (tmp_path / f"{device}.json").write_text(json.dumps(found))
    paths = [tmp_path / f"{device}.json" for device in ("cpu", "cuda:0")]
    words = words_of(rendered([run], tmp_path, *paths))
    shape = "prefill, batch 1, prompt 64"
    assert f"{shape} bfloat16 on cpu, 2 threads, too busy for a ratio 10.0 19.0" in words
    assert f"{shape} bfloat16 on cuda:0 10.0 19.0 {TIMES} 1.90" in words
    assert f"too busy for a ratio 10.0 19.0 {TIMES}" not in words


@pytest.fixture(scope="module")
def results(run, text_file, tmp_path_factory) -> Path:
    """What the run has in common with its original, on a text and in answers."""
    out = tmp_path_factory.mktemp("results") / "results.json"
    argv = ["eval", str(run), "--against", read_run(run).base_name, "--data", str(text_file)]
    argv += ["--windows", "3", "--seqlen", "24", "--answers", "11"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfsp.quality.answers.ANSWER_TOKENS", 3)
        assert main([*argv, "--out", str(out)]) == 0
    return out


def test_pairs_with_the_original(run, results, tmp_path):
    words = words_of(rendered([run], tmp_path, results))
    how = "3 windows of 24 tokens, without BOS, in float32; calibrated or trained on this text"
    assert re.search(rf"KL per token, nats, \S+ {how} {NOTHING} \d\.\d+ ± \d\.\d+", words)
    assert re.search(rf"top-1 agreement, percent, \S+ {how} {NOTHING} \d+\.\d ± ", words)


def test_numbers_of_more_or_fewer_things_share_no_row(run):
    """What two runs have in one row was measured on the same windows, and on as many documents."""
    estimate = {"value": 0.5, "stderr": None}
    pair = dict.fromkeys(("first", "second", "difference"), estimate)

    def compared(count: int, tasks: Sequence[str], shots: int, digest: str = "") -> dict[str, Any]:
        of_task = {"documents": count, "shots": shots, "is_above_chance": True, "accuracy": pair}
        of_task["digest"] = digest
        return {
            "texts": {"news": {"windows": count, "divergence": pair, "agreed": pair}},
            "tasks": {task: {**of_task, "kept": pair} for task in tasks},
            "left_out": [],
            "accuracy": pair,
            "kept": pair,
            "questions": count,
            "answers_digest": digest,
            "answers": {"divergence": pair, "agreed": None, "loops": pair},
        }

    def rows(*comparisons: dict[str, Any], seqlens: Sequence[int] = (512, 512)) -> list[int]:
        texts = [measured("news", 9.0, 9.0, seqlen=seqlen) for seqlen in seqlens]
        runs = [
            replace(read_run(run), name=str(number), facts=_comparison_facts(each, text))
            for number, (each, text) in enumerate(zip(comparisons, texts, strict=True))
        ]
        return [len(side_by_side(runs, each)) for each in (ANSWERS, AGREEMENT, PAIRS)]

    one = compared(4, ["piqa"], 0)
    assert rows(one, one) == [2, 2, 4]
    assert rows(one, one, seqlens=(512, 256)) == [2, 4, 4]
    assert rows(one, compared(5, ["piqa"], 0)) == [4, 2, 8]
    assert rows(one, compared(4, ["piqa"], 5)) == [2, 2, 8]
    assert rows(one, compared(4, ["piqa", "boolq"], 0)) == [2, 2, 8]
    # As many, but others.
    assert rows(one, compared(4, ["piqa"], 0, "other")) == [4, 2, 8]


def test_a_pair_of_tasks_says_what_it_is_of():
    """The metric that was compared, as other rows have both; and a mean of those that have it."""
    estimate = {"value": 0.5, "stderr": None}
    pair = {"second": estimate, "difference": estimate}
    scored = {"documents": 9, "accuracy": pair, "kept": pair}
    words = {**scored, "metric": "acc", "kept": None}
    tasks = {"piqa": {**scored, "metric": "acc_norm"}, "words": words}
    found = _comparison_facts({"tasks": tasks, "accuracy": pair, "kept": pair}, {})
    names = [fact.name for fact in found if "answers as" not in fact.name]
    assert names == [
        f"{task} - original's, percent"
        for task in ("piqa, acc_norm", "words, acc", "mean of tasks, accuracy")
    ]
    means = [fact.detail for fact in found if fact.name.startswith("mean of tasks")]
    assert means == ["piqa, words: 9 documents", "piqa: 9 documents"]


def test_results_of_another_folder_are_known_by_their_weights(
    run, results, tmp_path, monkeypatch, caplog
):
    def page_with(found: dict[str, Any], *runs: Path) -> str:
        (tmp_path / "moved.json").write_text(json.dumps(found))
        return words_of(rendered([*runs], tmp_path, tmp_path / "moved.json"))

    found = json.loads(results.read_text())
    for model, name in zip(found["models"], ("there/dense", "there/smaller"), strict=True):
        model["model"] = name
    monkeypatch.chdir(tmp_path)
    assert page_with(found, run) == words_of(rendered([run], tmp_path, results))
    found["models"][1]["fingerprint"] = "another's"
    with pytest.raises(ReportError, match="they are of: there/dense, there/smaller; measure"):
        page_with(found, run)
    # Of what was there before.
    found["models"][1]["model"] = str(run)
    with pytest.raises(ReportError, match=f"none of the runs, by their weights; .*, {run}; m"):
        page_with(found, run)
    found = json.loads(results.read_text())
    page_with(found, run)
    assert not caplog.messages
    # As of a model that was pruned twice, measured against the first of all.
    found["models"][0]["fingerprint"] = "another's"
    page_with(found, run)
    (told,) = caplog.messages
    assert f"left out of the results: {found['models'][0]['model']}, whose weights no run" in told


def test_answers_stand_side_by_side_by_kind(run, results, tmp_path):
    found = json.loads(results.read_text())
    for model in found["models"]:
        first = model["answers"]["documents"][0]
        first |= {"answer": f"answer of 2 {HOSTILE}", "loops": True}
        for document in model["answers"]["documents"][1:3]:
            document["question"] = "Chats may begin alike."
    copy = changed_copy(run, tmp_path / "recovered", recovered)
    found["models"].append({**found["models"][1], "model": str(copy)})
    (tmp_path / "three.json").write_text(json.dumps(found))
    text = rendered([run, copy], tmp_path, tmp_path / "three.json")
    page = _Page(text)
    kinds = [attrs for tag, attrs in page.tags if tag == "details" and "answers" in attrs.values()]
    assert ["open" in attrs for attrs in kinds] == [True] + [False] * 9
    # From right to left, where a question or an answer is written so.
    assert page.tags.count(("h4", {"dir": "auto"})) == 11
    assert page.tags.count(("dd", {"dir": "auto"})) == 3 * 11
    assert [tag for tag, _ in page.tags].count("script") == 1
    words = words_of(text.split("What they answer")[1])
    said = r"\S+ cut off repeats itself answer of 2 \S+ .*?"
    assert re.search(rf"facts \(2\) {re.escape(first['question'])} ({said}){{3}}", words)
    assert re.search(
        rf"KL per token on the original&#39;s answers, nats 11 questions {NOTHING} \d\.\d+", words
    )
    # Before everything else that was measured, and after what it is of.
    assert text.index("What they answer") < text.index("KL per token") < text.index("<figure>")
    first["kind"] = ["facts"]
    (tmp_path / "three.json").write_text(json.dumps(found))
    with pytest.raises(ReportError, match=r"three.json is damaged \(TypeError.*; measure again"):
        rendered([run, copy], tmp_path, tmp_path / "three.json")


def test_speed_that_the_demonstration_adds_to_the_manifest(run, tmp_path):
    copy = changed_copy(run, tmp_path / "copy", lambda manifest: None)
    add_to_manifest(copy, {"speed": timed(8, {"dense": 1.0, "pruned": 1.4})})
    words = words_of(rendered([copy], tmp_path))
    assert f"{TIMES} 1.40 decode, batch 1, prompt 8, 8 new tokens 10.0 to 14.0, tokens" in words
    assert f"prefill, batch 1, prompt 8 10.0 14.0 {TIMES} 1.40" in words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not what"),
        ('{"models": [{}]}', "not what"),
        ('{"models": []}', "results.json is not what `cfsp eval --out` writes; measure again with"),
        ('{"models": [{"model": "x", "perplexity": {}, "tokens": {}}]}', "of none of the runs"),
    ],
)
def test_unusable_results_are_refused(run, tmp_path, content, message):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ReportError, match=message):
        rendered([run], tmp_path, file)
    assert not (tmp_path / "report.html").exists()


def test_the_chart_by_block_as_a_file_of_its_own(run, monkeypatch, capsys):
    script = str(REPOSITORY / "benchmarks" / "block_picture.py")
    monkeypatch.setattr(sys, "argv", [script, str(run)])
    runpy.run_path(script, run_name="__main__")
    drawn = capsys.readouterr().out
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and "var(" not in drawn


# Sweeps.


def test_a_sweep_stands_for_its_runs(run, tmp_path, command):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    page = tmp_path / "page.html"
    argv = ["report", str(sweep), "--out", str(page)]
    assert "has no finished model yet; its command goes on" in command(*argv, status=2).err
    for name in ("cfsp-0.25", "wanda-sp-0.5", ".working"):
        copy = changed_copy(
            run, sweep / name, lambda m: m.update(sweep={"method": "cfsp", "sparsity": 0.25})
        )
        for weights in copy.glob("*.safetensors"):
            weights.unlink()
    assert main(argv) == 0
    assert [each.name for each in read_runs([sweep, run])] == ["cfsp-0.25", "wanda-sp-0.5", "run"]
    assert len(read_runs([sweep / "cfsp-0.25", sweep])) == 2  # each once
    (sweep / "sweep.json").unlink()  # as a sweep of an earlier state
    assert [each.name for each in read_runs([sweep])] == ["cfsp-0.25", "wanda-sp-0.5"]
    text = page.read_text()
    assert "Its weights were not kept" in text and "from_pretrained" not in text
    assert "wanda-sp-0.5" in text and ".working" not in text and "weights on disk" not in text


# What is there already.


def test_an_older_report_is_replaced_and_no_other_file(run, tmp_path):
    out = tmp_path / "report.html"
    rendered([run], tmp_path)
    out.write_text(out.read_text().replace("<h1>", "<h1>older "))
    assert "<h1>older" not in rendered([run], tmp_path)
    for other in ("<!doctype html><title>mine</title>", ""):
        out.write_text(other)
        with pytest.raises(OutputError, match="is no report of cfsp; delete it or choose another"):
            rendered([run], tmp_path)
        assert out.read_text() == other
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match="cannot replace"):
        write_report([run], tmp_path / "page.html")
    with pytest.raises(ReportError, match="nowhere does not exist; give what cfsp prune"):
        write_report([tmp_path / "nowhere"], tmp_path / "other.html")


# Many runs.


def many_runs(run: Path, place: Path, count: int) -> list[Path]:
    """Copies whose sizes grow and whose perplexity falls."""

    def change(number: int) -> Callable[[dict[str, Any]], None]:
        def changed(manifest: dict[str, Any]) -> None:
            manifest["parameters_after"] -= count - number
            for value in manifest["perplexity"].values():
                value["after"] = 900.0 - number

        return changed

    return [changed_copy(run, place / f"run-{n:03d}", change(n)) for n in range(count)]


def test_many_runs_stay_readable(run, tmp_path):
    """Of eight all is shown, each in a colour of its own; of more the blocks of the first eight."""
    paths = many_runs(run, tmp_path, 12)
    text = rendered(paths, tmp_path)
    # Every run is a row and a dot; what is drawn by block is of eight.
    assert text.count('<th scope="row">run-') == 12
    assert text.count('<circle class="hit"') >= 12
    names = re.search(r"by block is of the first 8:\n(.*?)\.</p>", text)
    assert names[1].split(", ") == [path.name for path in paths[:8]]
    assert "The other 4 runs of" in text
    assert text.count("Make it again") == 8
    text = rendered(paths[:8], tmp_path)
    assert text.count("Make it again") == 8
    assert "is of the first" not in text
    assert text.count('<th scope="col">run-') >= 8
    runs = [read_run(each) for each in paths]
    few, many = pareto_chart(runs[:8]), pareto_chart(runs)
    names = {name: swatch for swatch, name in few.legend}
    assert list(names) == [*(each.name for each in runs[:8]), "the original"]
    drawing, style = few.draw(920), page_file("charts.css")
    assert all(f'class="{swatch}"' in drawing and swatch in style for swatch in names.values())
    assert [name for _, name in many.legend] == ["on the front", "beaten"]


def test_a_recovered_run_repeats_no_chart_of_its_pruned_one(run, tmp_path):
    other = changed_copy(run, tmp_path / "recovered", recovered)
    both, alone = (group_runs(read_runs(paths))[0].charts for paths in ([run, other], [other]))
    panels = [
        {chart.key: chart.draw(920).count('class="panel"') for chart in charts}
        for charts in (both, alone)
    ]
    assert panels[0].pop("pareto") == 1
    assert panels[0] == panels[1] and set(panels[1]) == {"blocks", "recovery"}
