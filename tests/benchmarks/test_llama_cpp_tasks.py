"""benchmarks/choose.py scores tasks in llama.cpp as `cfsp eval --tasks` does in transformers."""

from __future__ import annotations

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
def tasks(tmp_path_factory) -> TaskRunner:
    """Choices of different lengths after one context, and one continuation after two contexts."""
    directory = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)

    def phrase(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    questions = [
        {"query": phrase(12), "choices": [f"{phrase(6)} {i}" for i in range(4)], "gold": 1}
        for _ in range(DOCUMENTS)
    ]
    sentences = [
        {"context_options": [phrase(9), phrase(9)], "continuation": phrase(4), "gold": 0}
        for _ in range(DOCUMENTS)
    ]
    for name, documents in (("arc_easy", questions), ("winogrande", sentences)):
        lines = [json.dumps(document) for document in documents]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return TaskRunner.of(TaskSelection(("arc_easy", "winogrande"), data=directory))


@pytest.fixture
def file(tiny_checkpoint, tmp_path) -> Path:
    found = tmp_path / "tiny.gguf"
    arguments = ["--to", "gguf", "--type", "f32", "--out", str(found), "--no-verify"]
    assert main(["export", str(tiny_checkpoint("llama")), *arguments]) == 0
    return found


def test_each_document_is_scored_as_in_transformers(tasks, file, tiny_checkpoint, tokenizer):
    ours = llama_cpp_tasks.scorer(tasks, file, tokenizer)
    theirs = tasks.scorer(load(tiny_checkpoint("llama"), dtype="float32"), tokenizer)
    for name in tasks.selection.task_names:
        found, expected = ours(name), theirs(name)
        assert found["tasks"] == expected["tasks"]
        for one, other in zip(found["documents"][name], expected["documents"][name], strict=True):
            near = pytest.approx(other["loglikelihoods"], abs=1e-3)
            assert one | {"loglikelihoods": None} == other | {"loglikelihoods": None}
            assert one["loglikelihoods"] == near


def test_a_file_is_scored_once_and_compared_with_the_first(
    tasks, file, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    results, directory = tmp_path / "tasks.json", tiny_checkpoint("llama")
    copy = tmp_path / "copy.gguf"
    copy.hardlink_to(file)
    choose._scored(tasks, file, directory, results)
    second = choose._scored(tasks, copy, directory, results)
    if second["accuracy"] is not None:
        assert second["difference"] == {"value": 0.0, "stderr": 0.0}
        assert second["kept"]["value"] == 1.0
    monkeypatch.setattr(llama_cpp_tasks, "scorer", None)
    assert choose._scored(tasks, copy, directory, results) == second
    # Its results are what `cfsp compare` reads.
    assert main(["compare", str(results), "--against", "tiny", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert set(pair["tasks"]) == {"arc_easy", "winogrande"}
