"""Pairs on the same windows and documents only, with NumPy's own standard errors."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsp.errors import ReportError
from cfsp.quality.compare import compare, comparisons
from cfsp.quality.paired import Number, mean, mean_of_tasks
from cfsp.quality.results_file import read_models

WINDOWS, DOCUMENTS = 6, 40
Model = dict[str, Any]


def text(seed: int, *, compared: bool = True, digest: str = "same") -> dict[str, Any]:
    generator, counts = random.Random(seed), [31] * (WINDOWS - 1) + [12]
    found: dict[str, Any] = {"digest": digest, "predicted": counts}
    found["loss"] = [count * (3 + generator.random()) for count in counts]
    if compared:
        found["divergence"] = [count * generator.random() for count in counts]
        found["agreed"] = [generator.randrange(count) for count in counts]
    return found


def picked(task: str, seed: int, right: float, *, norm: bool = True) -> list[dict[str, Any]]:
    """Documents of four choices, with about so many right answers."""
    generator, golds = random.Random(f"{task}{seed}"), random.Random(task)
    found = []
    for _ in range(DOCUMENTS):
        gold = golds.randrange(4)
        choice = gold if generator.random() < right else (gold + generator.randrange(1, 4)) % 4
        picked = {"choice": choice, "acc": float(choice == gold)}
        if norm:
            picked |= {"choice_norm": choice, "acc_norm": picked["acc"]}
        found.append({"gold": gold, "loglikelihoods": [-1.0, -2.0], "chance": 0.25, **picked})
    return found


def continued(seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [
        {"loglikelihoods": [-5 * generator.random()], "acc": float(generator.random() < 0.5),
         "chance": 0.0}
        for _ in range(DOCUMENTS)
    ]  # fmt: skip


def model(name: str, seed: int, *, right: float = 0.7) -> Model:
    """Return what is measured of a model; that of seed 0 is the dense one."""
    documents = {
        "piqa": picked("piqa", seed, right),
        "guessed": picked("guessed", seed, 0.25),
        "boolq": picked("boolq", seed, right, norm=False),
        "lambada_openai": continued(seed),
    }
    for task, its in documents.items():
        for number, document in enumerate(its):
            document |= {"id": f"{task}/{number}", "hash": f"{task}{number}"}
    return {
        "model": name,
        "fingerprint": f"print-{seed}",
        "perplexity": {},
        "windows": {"wiki": text(seed, compared=seed > 0), "code": text(seed + 100)},
        "tasks": {task: {"shots": 0} for task in documents},
        "documents": documents,
        **({"agreement": {"against": "dense", "fingerprint": "print-0"}} if seed else {}),
    }


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(name: str, *models: Model) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"models": list(models)}))
        return path

    return write


def test_differences_are_those_of_numpy(write):
    dense, one, two = model("dense", 0), model("one", 1), model("two", 2, right=0.5)
    models = read_models([write("a.json", dense, one), write("b.json", dense, two)])
    assert [each.name for each in models] == ["dense", "one", "two"]
    found = compare(models[1], models[2], models[0])

    def check(pair: Any, gap: Any) -> None:
        stderr = np.std(gap, ddof=1) / np.sqrt(len(gap))
        expected = pytest.approx({"value": np.mean(gap), "stderr": stderr}, abs=1e-6)
        assert pair["difference"] == expected

    def of(task: str, key: str) -> list[Any]:
        return [np.array([d[key] for d in each["documents"][task]]) for each in (dense, one, two)]

    wiki = found["texts"]["wiki"]
    counts = np.array(one["windows"]["wiki"]["predicted"])
    for name in ("loss", "divergence"):
        gap = np.subtract(two["windows"]["wiki"][name], one["windows"]["wiki"][name])
        expected = pytest.approx(gap.sum() / counts.sum(), abs=1e-6)
        assert wiki[name]["difference"]["value"] == expected
    piqa = found["tasks"]["piqa"]
    told = {"metric": "acc_norm", "documents": DOCUMENTS, "is_above_chance": True}
    assert told.items() <= piqa.items()
    (of_dense, of_one, of_two), (gold, *_) = of("piqa", "choice_norm"), of("piqa", "gold")
    check(piqa["accuracy"], (of_two == gold).astype(float) - (of_one == gold))
    check(piqa["kept"], (of_two == of_dense).astype(float) - (of_one == of_dense))
    lambada = found["tasks"]["lambada_openai"]
    assert lambada["kept"] is None
    _, of_one, of_two = of("lambada_openai", "loglikelihoods")
    check(lambada["loss"], (of_one - of_two)[:, 0])
    # A task that the dense model guesses counts for nothing.
    assert found["left_out"] == ["guessed"]
    counted = [found["tasks"][task]["accuracy"] for task in ("piqa", "boolq", "lambada_openai")]
    values, errors = np.transpose([[*each["difference"].values()] for each in counted])
    expected = {"value": values.mean(), "stderr": np.sqrt((errors**2).sum()) / 3}
    assert found["accuracy"]["difference"] == pytest.approx(expected, abs=1e-6)


def test_a_task_of_which_no_documents_are_known_is_left_out(write):
    """Tasks of kinds that are not read ended in a traceback."""
    models = [model("dense", 0), model("one", 1)]
    for each in models:
        each["documents"]["wikitext"] = []
    dense, one = read_models([write("a.json", *models)])
    assert set(compare(dense, one, dense)["tasks"]) == set(models[0]["documents"]) - {"wikitext"}


def test_the_dense_model_agrees_with_itself(write):
    models = read_models([write("a.json", model("dense", 0), model("one", 1))])
    (found,) = comparisons(models, models[0], None)
    assert (found["first"], found["second"]) == ("dense", "one")
    wiki = found["texts"]["wiki"]
    assert (wiki["divergence"]["first"]["value"], wiki["agreed"]["first"]["value"]) == (0, 1)
    assert found["tasks"]["piqa"]["kept"]["first"]["value"] == 1


def test_a_dense_model_that_was_scored_by_other_metrics_is_refused(write):
    dense = model("dense", 0)
    for document in dense["documents"]["piqa"]:
        del document["acc_norm"]
    models = read_models([write("a.json", dense, model("one", 1), model("two", 2))])
    with pytest.raises(ReportError, match="one and dense were scored on piqa by other metrics"):
        compare(models[1], models[2], models[0])


def test_without_a_dense_model_there_are_differences_only(write):
    alone = [model(name, seed) for seed, name in enumerate(("one", "two"), start=1)]
    for each in alone:
        del each["agreement"]
    models = read_models([write(f"{each['model']}.json", each) for each in alone])
    (found,) = comparisons(models, None, None)
    assert found["kept"] is None and found["texts"]["wiki"]["divergence"] is None
    assert found["accuracy"] is not None and not found["left_out"]
    with pytest.raises(ReportError, match="a comparison needs two models, found one; give"):
        comparisons(models[:1], None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["windows"]["wiki"].update(digest="other"), "on other windows of wiki"),
        (lambda m: m["documents"]["piqa"].pop(), "on 40 and 39 documents of piqa"),
        (lambda m: m["documents"]["piqa"][3].update(hash="x"), "on other documents of piqa"),
        (lambda m: m["tasks"]["piqa"].update(shots=5), "on piqa with 0 and 5 shots"),
        (lambda m: m.update(windows={}, documents={}), "no text and no task in common"),
        (lambda m: m.pop("windows"), "has no windows or documents of two"),
        (lambda m: m["windows"]["wiki"].pop("loss"), "a.json or {there}/b.json is damaged"),
        (lambda m: m["windows"]["wiki"]["loss"].pop(), "b.json is damaged (ValueError"),
        (lambda m: m["documents"]["piqa"][3].pop("hash"), "b.json is damaged (KeyError('hash'))"),
    ],
)
def test_what_does_not_compare_is_one_sentence(change, message, write, command, tmp_path):
    other = model("two", 2)
    change(other)
    files = (write("a.json", model("one", 1)), write("b.json", other))
    printed = command("compare", *files, status=2)
    assert message.format(there=tmp_path) in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_the_dense_model_may_be_named_as_a_file_is(write, tmp_path, command):
    """That of a GGUF is, and no results are in it."""
    weights = tmp_path / "dense.gguf"
    weights.write_bytes(b"\x80")
    names = ((str(weights), 0), ("a", 1), ("b", 2))
    files = [write(f"{seed}.json", model(name, seed)) for name, seed in names]
    printed = command("compare", *files, "--against", weights)
    assert f"against {weights};" in printed.out


def test_the_first_model_of_the_dense_file_is_the_dense_one(write, command, monkeypatch):
    """Also where another file has it as well, and its own file has others."""
    everything = write("all.json", model("dense", 0), model("a", 1))
    own = write("own.json", model("dense", 0), model("b", 2))
    assert "\nagainst dense; " in command("compare", everything, "--against", own).out
    monkeypatch.setenv("HOME", str(own.parent))  # as a shell leaves it in --against=~/own.json
    assert "\nagainst dense; " in command("compare", everything, "--against=~/own.json").out


def test_what_is_printed(write, command):
    dense = write("dense.json", model("dense", 0))
    files = [write(f"{name}.json", model(name, seed)) for seed, name in ((1, "a"), (2, "b"))]
    printed = command("compare", *files, "--against", dense).out
    assert printed.count("first: dense\n") == 2
    for said in (
        "first: a\nsecond: b\n",
        "mean of 3 tasks\n  accuracy, %",
        "\n  answers as the dense model's, % (of 2)  ",
        "guessed is left out of the mean: the dense model (",
        "lambada_openai, 40 documents\n  acc, %",
        "\n  loss, nats  ",
    ):
        assert said in printed
    assert printed.splitlines()[-1].startswith("against dense; differences are second - first")
    found = json.loads(command("compare", *files, "--base", "b", "--json").out)
    assert found["against"] is None
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"], set(pair["texts"])) == ("b", "a", {"wiki", "code"})
    refused = command("compare", *files, "--base", "c", status=2).err
    assert "expected a model of the files (a, b), found 'c'" in refused


def test_nothing_has_no_minus(write, command):
    """As the KL of a copy in other digits, which rounding takes below zero."""
    dense, copy = model("dense", 0), model("copy", 1)
    for text in copy["windows"].values():
        text["divergence"] = [-1e-6] * WINDOWS
    printed = command("compare", write("a.json", dense, copy)).out
    assert "-0.0000 " not in printed


def test_two_measurements_of_one_model_are_told_of(write, caplog):
    files = [write(f"{name}.json", model("one", 1)) for name in ("a", "b")]
    read_models(files)
    assert not caplog.messages
    again = model("one", 1)
    again["windows"]["wiki"]["loss"][0] += 0.5
    again["documents"]["piqa"][0]["choice"] = 7
    read_models([files[0], write("b.json", again)])
    assert caplog.messages == [
        f"{files[0]} and {files[1]} differ in the results of one on {what}, of which one is "
        "compared; name one file"
        for what in ("wiki", "piqa")
    ]


def test_models_in_different_dtypes_are_told_of(write, command):
    whole, half = (
        {**model(name, number), "dtype": dtype}
        for number, (name, dtype) in enumerate([("dense", "float32"), ("half", "bfloat16")])
    )
    told = command("compare", write("a.json", whole, half)).err
    assert told == (
        "computed were dense in float32 and half in bfloat16: the differences are of rounding too\n"
    )
    alike = {**half, "dtype": "float32"}
    assert not command("compare", write("a.json", whole, alike)).err


def test_what_is_printed_is_narrow_whatever_files_are_called(write, command):
    text = f"/home/{'somebody/' * 12}news/test.jsonl"
    models = [model(name, seed) for seed, name in ((1, "a"), (2, "b"))]
    for each in models:
        each["windows"][text] = each["windows"].pop("wiki")
    files = [write(f"{each['model']}.json", each) for each in models]
    lines = command("compare", *files).out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "news/test.jsonl, 6 windows" in lines


def test_models_of_one_name_are_told_apart_by_file(write):
    one, other = write("a.json", model("smaller", 1)), write("b.json", model("smaller", 2))
    names = [each.name for each in read_models([one, other])]
    assert names == [f"smaller ({one})", f"smaller ({other})"]


def test_one_model_of_two_files_is_one(write):
    texts, tasks = model("one", 1), model("one", 1)
    texts["documents"], tasks["windows"] = {}, {}
    (found,) = read_models([write("texts.json", texts), write("tasks.json", tasks)])
    assert set(found.windows) == {"wiki", "code"}
    assert len(found.documents) == 4
    tasks["windows"] = {"wiki": text(1, digest="other")}
    with pytest.raises(ReportError, match="measured one on other parts of wiki"):
        read_models([write("texts.json", texts), write("tasks.json", tasks)])


def test_a_dense_model_of_two_names_is_one(write, command):
    dense, same, one = model("dense", 0), model("./dense", 0), model("one", 1)
    dense["documents"], copy = {}, model("cut by nothing", 0)
    files = [write("a.json", dense, copy), write("b.json", same, one)]
    assert [each.name for each in read_models(files)] == ["dense", "cut by nothing", "one"]
    told = [command("compare", *files, *more).out for more in ((), ("--against", "./dense"))]
    assert told[0] == told[1] and "guessed is left out of the mean" in told[0]


def test_written_answers_that_nobody_could_read_are_not_the_same(write):
    models = [model("dense", 0), model("one", 1)]
    for each, written in zip(models, ("12 [invalid] [invalid] 7", "13 [invalid] 7 7"), strict=True):
        each["documents"] = {
            "gsm8k": [
                {"id": f"gsm8k/{at}", "hash": "a", "acc": 0.0, "chance": 0.0, "answer": answer}
                for at, answer in enumerate(written.split())
            ]
        }
    dense, one = read_models([write("a.json", *models)])
    assert compare(dense, one, dense)["tasks"]["gsm8k"]["kept"]["second"]["value"] == 0.25


def test_what_was_compared_with_another_dense_model_is_not_taken_for_this_one_s(write, command):
    dense, other = model("dense", 0), model("another", 3)
    on_wiki, on_code = model("one", 1), model("one", 1)
    del on_wiki["windows"]["code"], on_code["windows"]["wiki"], other["agreement"]
    on_code["agreement"] = {"against": "another", "fingerprint": "print-3"}
    files = [write("a.json", dense, on_wiki), write("b.json", other, on_code)]
    told = command("compare", *files, status=2).err
    assert "compared with different dense models; name one with --against" in told
    found = json.loads(command("compare", *files, "--against", "dense", "--json").out)["pairs"]
    (pair,) = (each for each in found if (each["first"], each["second"]) == ("dense", "one"))
    divergences = {text: pairs["divergence"] for text, pairs in pair["texts"].items()}
    assert divergences["wiki"] is not None and divergences["code"] is None
    # On one text with both: each has its own, in whatever order the files are read.
    on_code["windows"]["wiki"] = on_wiki["windows"]["wiki"] | {"divergence": [9.0] * WINDOWS}
    files[1] = write("b.json", other, on_code)
    for order in (files, files[::-1]):
        by_name = {each.name: each for each in read_models(order)}
        nines = compare(by_name["another"], by_name["one"], by_name["another"])
        assert nines["texts"]["wiki"]["divergence"]["second"]["value"] == pytest.approx(54 / 167)
        own = compare(by_name["dense"], by_name["one"], by_name["dense"])["texts"]["wiki"]
        assert own["divergence"]["second"] == pair["texts"]["wiki"]["divergence"]["second"]


def test_of_a_task_with_an_accuracy_of_its_own_no_guess_is_known(write):
    models = [model(name, seed) for seed, name in enumerate(("dense", "one"))]
    for each in models:
        each["documents"]["guessed"][0] |= {"acc": 0.5, "chance": None}
    found = compare(*read_models([write("a.json", *models)]), None)["tasks"]["guessed"]
    assert found["chance"] is None and found["is_above_chance"] is None
    # Before, the accuracy was that of choices.
    models[0]["documents"]["guessed"][0]["chance"] = 0.25
    with pytest.raises(ReportError, match="scored on guessed by other metrics"):
        compare(*read_models([write("a.json", *models)]), None)


def test_of_a_single_document_or_task_there_is_no_error():
    assert mean_of_tasks([Number(1.0, 0.3), Number(2.0, None)]).stderr is None
    assert mean([1.0]) == Number(1.0, None)
