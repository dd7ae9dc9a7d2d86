"""Our wiring of lm-evaluation-harness gives the harness's own numbers on the harness's own text."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from cfsp.checkpoint.loading import load
from cfsp.cli import main
from cfsp.errors import TaskError, UsageError
from cfsp.quality import evaluate
from cfsp.quality.evaluate import evaluate_models
from cfsp.quality.tasks.documents import read_documents
from cfsp.quality.tasks.harness import TaskRunner, TaskScorer
from cfsp.quality.tasks.selection import PAPER_SUITE, TaskSelection, jsonl_task_directory
from cfsp.result.names import short_names
from cfsp.settings import Compute, EvaluationText

FILES = {
    "piqa": "piqa.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "arc_challenge": "arc_challenge.jsonl",
    "openbookqa": "openbook_qa.jsonl",
    "boolq": "boolq.jsonl",
    "winogrande": "winogrande.jsonl",
    "hellaswag": "hellaswag.jsonl",
    "lambada_openai": "lambada.jsonl",
}
# Of the harness, with these tasks and those of MMLU.
FOLDERS = (
    "arc", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "super_glue", "winogrande",
)  # fmt: skip
WORDS = ["river", "stone", "light", "green", "runs", "falls", "under", "small", "plan", "wörd"]
DOCUMENTS = 12


def _phrase(generator: random.Random, longest: int = 6) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))


def _original_and_ours(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the same random documents in the hub data set's fields and in the JSONL fields."""
    generator = random.Random(task)
    original: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    for _ in range(DOCUMENTS):
        question, passage = _phrase(generator), _phrase(generator, 20)
        choices = [_phrase(generator) + f" {i}" for i in range(4)]
        gold = generator.randrange(2)
        if task == "lambada_openai":
            original.append({"text": f"{passage} {question}"})
            ours.append(original[-1])
            continue
        if task == "piqa":
            original.append(
                {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": gold}
            )
            query, choices = f"Question: {question}\n", choices[:2]
        elif task in ("arc_easy", "arc_challenge"):
            labels = {"text": choices, "label": ["A", "B", "C", "D"]}
            original.append({"question": question, "choices": labels, "answerKey": "AB"[gold]})
            query = f"Question: {question}"
        elif task == "openbookqa":
            labels = {"text": choices, "label": ["A", "B", "C", "D"]}
            original.append({"question_stem": question, "choices": labels, "answerKey": "AB"[gold]})
            query = question
        elif task == "boolq":
            original.append({"passage": passage, "question": question, "label": gold})
            query, choices = f"Passage: {passage}\nQuestion: {question}?", ["no", "yes"]
        elif task == "hellaswag":
            # What the harness's own preprocessing makes of these fields is the file's query.
            original.append(
                {
                    "activity_label": "Act",
                    "ctx_a": f"{passage}.",
                    "ctx_b": question,
                    "endings": choices,
                    "label": str(gold),
                }
            )
            query = f"Act: {passage}. {question.capitalize()}"
        else:
            rest = f"{question}."
            original.append(
                {
                    "sentence": f"{passage} _ {rest}",
                    "option1": choices[0],
                    "option2": choices[1],
                    "answer": str(gold + 1),
                }
            )
            contexts = [f"{passage} {choice}" for choice in choices[:2]]
            ours.append({"context_options": contexts, "continuation": rest, "gold": gold})
            continue
        ours.append({"query": query, "choices": choices, "gold": gold})
    return original, ours


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for task, file in FILES.items():
        lines = [json.dumps(document) for document in _original_and_ours(task)[1]]
        (directory / file).write_text("\n".join(lines) + "\n")
    return directory


def _requests(task: Any) -> list[tuple[str, str]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.fixture(scope="module")
def stock_tasks() -> TaskManager:
    """The harness's own index of these tasks; one of all its 14,000 files takes ten seconds."""
    places = [Path(lm_eval.tasks.__file__).parent / name for name in FOLDERS]
    return TaskManager(include_path=places, include_defaults=False)


@pytest.fixture(autouse=True)
def one_index(stock_tasks: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give that index to whoever would make another one."""

    def manager(include_defaults: bool = True, **options: Any) -> TaskManager:
        return stock_tasks if include_defaults else TaskManager(include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


@pytest.mark.parametrize("task", FILES)
def test_text_and_choices_are_those_of_the_harness(
    task: str, task_data: Path, stock_tasks: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    original, _ = _original_and_ours(task)
    rows = datasets.Dataset.from_list(original)
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    stock = stock_tasks.load([task])["tasks"][task]
    runner = TaskRunner.of(TaskSelection((task,), data=task_data))
    ours = runner.manager.load([task])["tasks"][task]
    assert _requests(ours) == _requests(stock)
    assert set(ours._metric_fn_list) == set(stock._metric_fn_list)
    assert ours.VERSION == stock.VERSION


def test_questions_of_mmlu_are_those_of_the_harness(
    tmp_path: Path, stock_tasks: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    letters = ["A", "B", "C", "D"]
    original, ours = [], []
    for number in range(3):
        options = [f"{word} {number}" for word in WORDS[:4]]
        question = f"Which word is number {number}?"
        original.append({"question": question, "choices": options, "answer": number})
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        begin = "The following are multiple choice questions (with answers) about astronomy.\n\n"
        query = begin + "\n".join([question, *lines, "Answer:"])
        ours.append({"query": query, "choices": letters, "gold": number})
    rows = datasets.Dataset.from_list(original)
    splits = datasets.DatasetDict(dict.fromkeys(("dev", "validation", "test"), rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    stock = stock_tasks.load(["mmlu_astronomy"])["tasks"]["mmlu_astronomy"]
    (tmp_path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, ours)))
    runner = TaskRunner.of(TaskSelection(("mmlu",), data=tmp_path))
    assert _requests(runner.manager.load(["mmlu"])["tasks"]["mmlu"]) == _requests(stock)


def test_number_is_exactly_the_harnesss_own_for_a_stock_checkpoint(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: Any,
    task_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tiny_checkpoint("llama")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    expected = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=list(FILES),
        task_manager=TaskManager(
            include_path=jsonl_task_directory(),
            include_defaults=False,
            metadata={"directory": str(task_data)},
        ),
        bootstrap_iters=2,
    )["results"]
    monkeypatch.delenv("DISABLE_MULTIPROC")
    # A fork of many threads can hang.
    monkeypatch.setattr("multiprocessing.Pool", None)
    runner = TaskRunner.of(TaskSelection(tuple(FILES), data=task_data))
    scorer = runner.scorer(load(directory, dtype="float32"), tokenizer)
    right = 0.0
    for task in FILES:
        scored = scorer.score(task)
        (scores,), (documents,) = scored["tasks"].values(), scored["documents"].values()
        right += scores["acc"]
        assert scores["acc"] == expected[task]["acc,none"]
        assert scores["acc_stderr"] == expected[task]["acc_stderr,none"]
        assert scores["documents"] == DOCUMENTS
        assert scores["shots"] == 0
        assert scores.get("acc_norm") == expected[task].get("acc_norm,none")
        assert scores.get("acc_norm_stderr") == expected[task].get("acc_norm_stderr,none")
        assert len({document["hash"] for document in documents}) == DOCUMENTS
        assert [document["id"] for document in documents] == [f"{task}/{i}" for i in range(12)]
        for metric in ("acc", "acc_norm"):
            if metric in scores:
                assert sum(each[metric] for each in documents) / DOCUMENTS == scores[metric]
        if task == "lambada_openai":
            loss = -sum(each["loglikelihoods"][0] for each in documents) / DOCUMENTS
            assert scores["loss"] == pytest.approx(loss)
            assert math.exp(loss) == pytest.approx(expected[task]["perplexity,none"], rel=1e-5)
            assert scores["chance"] == 0
            continue
        for document in documents:
            assert document["acc"] == (document["choice"] == document["gold"])
            assert document["choice"] == max(
                range(len(document["loglikelihoods"])), key=document["loglikelihoods"].__getitem__
            )
            if "acc_norm" in document:
                assert document["acc_norm"] == (document["choice_norm"] == document["gold"])
        choices = 2 if task in ("piqa", "winogrande") else 4
        if task == "boolq":  # all documents have the same choices: say the same to each
            yes = sum(document["gold"] for document in documents) / DOCUMENTS
            assert scores["chance"] == pytest.approx(max(yes, 1 - yes), abs=1e-6)
        else:
            assert scores["chance"] == 1 / choices
    # A random model on random text is right now and then, not always and not never.
    assert 0 < right < len(FILES)


def test_second_model_is_scored_as_if_it_were_the_first(
    tiny_checkpoint: Callable[[str], Path], tokenizer: Any, task_data: Path
) -> None:
    runner = TaskRunner.of(TaskSelection(("piqa",), data=task_data))
    first, other, again = (
        runner.scorer(load(tiny_checkpoint(name)), tokenizer).score("piqa")
        for name in ("llama", "qwen3", "llama")
    )
    assert first == again
    assert other != first


def test_shots_and_limit_reach_the_harness_which_asks_git_nothing(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: Any,
    task_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = TaskRunner.of(TaskSelection(("winogrande",), limit=5, shots=2, data=task_data))
    found = runner.scorer(load(tiny_checkpoint("llama")), tokenizer).score("winogrande")
    scores = found["tasks"]["winogrande"]
    assert (scores["shots"], scores["documents"]) == (2, 5)
    conditions = runner.conditions()
    assert (conditions["limit"], conditions["shots"]) == (5, 2)
    assert conditions["harness"].startswith("lm-evaluation-harness 0.")
    assert "git" not in capfd.readouterr().err


def test_paper_suite_is_one_name() -> None:
    assert TaskSelection(("cfsp-paper",)).task_names == list(PAPER_SUITE)
    assert TaskSelection(("piqa", "cfsp-paper")).task_names[0] == "piqa"
    assert len(PAPER_SUITE) == 8
    # Every one of them is a task or group of the installed harness.
    TaskRunner.of(TaskSelection(("cfsp-paper",)))


def test_texts_and_tasks_together_in_json(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    task_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["eval", str(tiny_checkpoint("llama")), "--tasks", "piqa,boolq", "--json"]
    arguments += ["--task-data", str(task_data), "--limit", "4", "--dtype", "float32"]
    arguments += ["--data", str(text_file), "--windows", "2", "--seqlen", "32"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    (model,) = printed["models"]
    assert set(model["tasks"]) == {"piqa", "boolq"}
    assert model["tasks"]["piqa"]["version"] == 1.0
    assert "acc_norm" in model["tasks"]["piqa"]
    assert "acc_norm" not in model["tasks"]["boolq"]
    perplexity = model["perplexity"][str(text_file)]
    assert perplexity["tokens"] == 2 * 31
    assert (perplexity["seqlen"], model["dtype"]) == (32, "float32")
    assert printed["tasks"]["limit"] == 4


def test_table_has_a_column_for_each_model(
    tiny_checkpoint: Callable[[str], Path], task_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(tiny_checkpoint("llama")), str(tiny_checkpoint("qwen2"))]
    assert main(["eval", *models, "--tasks", "piqa", "--task-data", str(task_data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "documents", *short_names(models).values()]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["piqa", "acc", "12"],
        ["piqa", "acc_norm", "12"],
    ]
    assert lines[2].count("±") == 2


def test_an_interrupted_run_goes_on_with_the_next_task(
    tiny_checkpoint: Callable[[str], Path],
    task_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [str(tiny_checkpoint(name)) for name in ("llama", "qwen2")]
    argv = ["eval", *models, "--tasks", "piqa,lambada_openai", "--task-data", str(task_data)]
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert main([*argv, "--out", str(whole)]) == 0
    plain, seen = TaskScorer.score, []

    def killed(count: int) -> Callable[..., Any]:
        def score(scorer: TaskScorer, name: str) -> dict[str, Any]:
            seen.append(name)
            if len(seen) == count:
                raise KeyboardInterrupt
            return plain(scorer, name)

        return score

    monkeypatch.setattr(TaskScorer, "score", killed(3))
    assert main([*argv, "--out", str(out)]) == 130
    assert not out.exists()
    seen.clear()
    monkeypatch.setattr(TaskScorer, "score", killed(0))
    assert main([*argv, "--out", str(out)]) == 0
    assert seen == ["piqa", "lambada_openai"]
    found = json.loads(out.read_text())
    assert found == json.loads(whole.read_text())
    assert set(found["models"][1]["documents"]) == {"piqa", "lambada_openai"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_cannot_be_reached_is_told_before_any_data_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TaskManager, "load", lambda *_: pytest.fail("too late"))
    # A misspelt name is not the hub's fault.
    with pytest.raises(TaskError, match="harness has no task 'piqaa'"):
        TaskRunner.of(TaskSelection(("piqaa",)))
    assert main(["eval", "no/such/model", "--tasks", "piqa,arc_easy"]) == 2
    told = capsys.readouterr().err
    assert "the hub, which has the data of piqa, arc_easy, cannot be reached from here" in told
    with pytest.raises(TaskError, match="give local files with --task-data"):
        TaskRunner.of(TaskSelection(("piqa",)))


def test_unknown_task_is_told_before_any_model_is_looked_for(
    task_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "no/such/model", "--task-data", str(task_data), "--tasks"]
    assert main([*argv, "arc_esy"]) == 2
    assert "did you mean arc_easy" in capsys.readouterr().err
    assert main([*argv, "cfsp-papr"]) == 2
    assert "did you mean cfsp-paper?" in capsys.readouterr().err
    assert main([*argv, "zzz"]) == 2
    assert "it has, for example: hellaswag, piqa, " in capsys.readouterr().err


def test_unusable_task_data_and_models_too_large_are_told_before_the_first_forward_pass(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    task_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "streamed_sums", lambda *_, **__: pytest.fail("too late"))
    directory, texts = tiny_checkpoint("llama"), EvaluationText((str(text_file),), 2, 32)
    runner = TaskRunner.of(TaskSelection(("piqa",), data=tmp_path))
    with pytest.raises(TaskError, match="cannot read the task file"):
        evaluate_models([directory], texts, Compute(), runner)
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    runner = TaskRunner.of(TaskSelection(("piqa",), data=task_data))
    with pytest.raises(UsageError, match="scoring tasks runs the whole model, which takes about"):
        evaluate_models([directory], texts, Compute(), runner)


def test_scores_depend_on_what_is_in_the_files(task_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(task_data, tmp_path / "data"))

    def identity() -> dict[str, Any]:
        return TaskRunner.of(TaskSelection(("piqa",), data=data)).identity()

    before = identity()
    (data / "arc_easy.jsonl").unlink()
    assert identity() == before
    lines = (data / "piqa.jsonl").read_text().splitlines(keepends=True)
    (data / "piqa.jsonl").write_text("".join(lines[1:]))
    assert identity() != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"query": "a", "choices": ["b"]}', "expected query, choices and gold"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1, but there are 1 choices"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "a choice is empty"),
        ("[]", "found: list"),
        ('{"text": "word"}', "whose last word follows a space, found 'word'"),
        ("", "holds no documents"),
    ],
)
def test_damaged_task_file_is_one_sentence(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TaskError, match=message):
        read_documents(path)


def test_missing_task_file_is_an_error_of_the_command(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint("llama"))
    assert main(["eval", model, "--tasks", "piqa", "--task-data", str(tmp_path)]) == 2
    assert f"cannot read the task file {tmp_path / 'piqa.jsonl'}" in capsys.readouterr().err
    assert main(["eval", model]) == 2
    assert "expected --data, --tasks, --answers or several" in capsys.readouterr().err
    absent = tmp_path / "absent"
    assert main(["eval", model, "--tasks", "piqa", "--task-data", str(absent)]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ()}, "at least one task"),
        ({"names": ("piqa",), "limit": 0}, "--limit must be at least 1, found 0"),
        ({"names": ("piqa",), "shots": -1}, "--shots must be at least 0, found -1"),
    ],
)
def test_impossible_selection_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TaskSelection(**fields)
