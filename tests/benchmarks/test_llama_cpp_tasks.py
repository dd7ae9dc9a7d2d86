"""benchmarks/choose.py scores tasks in llama.cpp as `cfsp eval --tasks` does in transformers."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("llama_cpp_py_sync", reason="the extra `llamacpp` is not installed")
pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

import choose
import llama_cpp_tasks
from cfsp.checkpoint.loading import load
from cfsp.cli import main
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import TaskSelection

WORDS = ["river", "stone", "light", "green", "runs", "falls", "under", "small", "plan"]
DOCUMENTS = 6


@pytest.fixture(scope="module")
def tasks(model, tokenizer, tmp_path_factory) -> TaskRunner:
    """Choices of different lengths after one context, and one continuation after two contexts.

    What the model chooses of the first is right: it is better than a guess.
    """
    directory = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)

    def phrase(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    questions = [
        {"query": phrase(12), "choices": [f"{phrase(6)} {i}" for i in range(4)], "gold": 0}
        for _ in range(DOCUMENTS)
    ]
    sentences = [
        {"context_options": [phrase(9), phrase(9)], "continuation": phrase(4), "gold": 0}
        for _ in range(DOCUMENTS)
    ]
    selection = TaskSelection(("arc_easy", "winogrande"), data=directory)

    def runner() -> TaskRunner:
        for name, documents in (("arc_easy", questions), ("winogrande", sentences)):
            lines = map(json.dumps, documents)
            (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return TaskRunner.of(selection)

    chosen = runner().scorer(load(model, dtype="float32"), tokenizer)("arc_easy")["documents"]
    for question, document in zip(questions, chosen["arc_easy"], strict=True):
        question["gold"] = document["choice_norm"]
    return runner()


@pytest.fixture
def file(model, tmp_path) -> Path:
    found = tmp_path / "tiny.gguf"
    arguments = ["--to", "gguf", "--type", "f32", "--out", str(found), "--no-verify"]
    assert main(["export", str(model), *arguments]) == 0
    return found


def test_each_document_is_scored_as_in_transformers(tasks, file, model, tokenizer):
    ours = llama_cpp_tasks.scorer(tasks, file, tokenizer)
    theirs = tasks.scorer(load(model, dtype="float32"), tokenizer)
    for name in tasks.selection.task_names:
        found, expected = ours(name), theirs(name)
        assert found["tasks"] == expected["tasks"]
        for one, other in zip(found["documents"][name], expected["documents"][name], strict=True):
            near = pytest.approx(other["loglikelihoods"], abs=1e-3)
            assert one | {"loglikelihoods": None} == other | {"loglikelihoods": None}
            assert one["loglikelihoods"] == near


def test_a_file_is_scored_once_and_compared(tasks, file, model, tmp_path, monkeypatch, command):
    results = tmp_path / "tasks.json"
    copy = tmp_path / "copy.gguf"
    copy.hardlink_to(file)
    choose._scored(tasks, file, model, results)
    second = choose._scored(tasks, copy, model, results)
    assert (second["counted"], second["accuracy"]["value"]) == (["arc_easy"], 1.0)
    assert second["difference"] == {"value": 0.0, "stderr": 0.0}
    assert second["kept"]["value"] == 1.0
    monkeypatch.setattr(llama_cpp_tasks, "scorer", None)
    assert choose._scored(tasks, copy, model, results) == second
    # Its results are what `cfsp compare` reads.
    told = command("compare", results, "--against", "tiny", "--json").out
    (pair,) = json.loads(told)["pairs"]
    assert set(pair["tasks"]) == {"arc_easy", "winogrande"}
