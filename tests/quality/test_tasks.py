"""Our wiring of lm-evaluation-harness gives the harness's own numbers on the harness's own text."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from builders import entries, never, read_json
from cfsp.checkpoint.loading import load
from cfsp.cli import main
from cfsp.errors import TaskError, TextError, UsageError
from cfsp.quality import evaluate
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import Exam, evaluate_models
from cfsp.quality.results_file import measured_model
from cfsp.quality.tasks.harness import TaskRunner, scored_documents, summary_of
from cfsp.quality.tasks.selection import JSONL_TASKS, PAPER_SUITE, TaskSelection, read_documents
from cfsp.result.names import short_names
from cfsp.settings import Compute, EvaluationText

_AS_NAMED = ("piqa", "arc_easy", "arc_challenge", "boolq", "winogrande", "hellaswag", "mmlu")
FILES = {
    **{task: f"{task}.jsonl" for task in _AS_NAMED},
    "openbookqa": "openbook_qa.jsonl",
    "lambada_openai": "lambada.jsonl",
}
LETTERS = ["A", "B", "C", "D"]
MMLU_BEGINS = "The following are multiple choice questions (with answers) about astronomy."
# Of the harness, with these tasks and those of MMLU.
FOLDERS = (
    "arc", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "super_glue", "winogrande",
)  # fmt: skip
WORDS = ["river", "stone", "light", "green", "runs", "falls", "under", "small", "plan", "wörd"]
DOCUMENTS = 12


def _phrase(generator: random.Random, longest: int = 6) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))


def _documents(task: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the same random documents in the hub data set's fields and in the JSONL fields."""
    generator = random.Random(task)
    for _ in range(DOCUMENTS):
        asked, passage = _phrase(generator), _phrase(generator, 20)
        choices = [_phrase(generator) + f" {i}" for i in range(4)]
        gold = generator.randrange(2)
        labelled = {"choices": {"text": choices, "label": LETTERS}, "answerKey": "AB"[gold]}
        query = asked
        match task:
            case "lambada_openai":
                original = {"text": f"{passage} {asked}"}
                yield original, original
                continue
            case "winogrande":
                original = {"option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}
                contexts = [f"{passage} {choice}" for choice in choices[:2]]
                # The harness takes what is behind the blank without its space.
                ours = {"context_options": contexts, "continuation": f" {asked}.", "gold": gold}
                yield {"sentence": f"{passage} _ {asked}.", **original}, ours
                continue
            case "piqa":
                choices = choices[:2]
                original = {"goal": asked, "sol1": choices[0], "sol2": choices[1], "label": gold}
                query = f"Question: {asked}\n"
            case "arc_easy" | "arc_challenge":
                original, query = {"question": asked, **labelled}, f"Question: {asked}"
            case "openbookqa":
                original = {"question_stem": asked, **labelled}
            case "boolq":
                original = {"passage": passage, "question": asked, "label": gold}
                query, choices = f"Passage: {passage}\nQuestion: {asked}?", ["no", "yes"]
            case "hellaswag":
                # What the harness's own preprocessing makes of these fields is the file's query.
                original = {"activity_label": "Act", "ctx_a": f"{passage}.", "ctx_b": asked}
                original |= {"endings": choices, "label": str(gold)}
                query = f"Act: {passage}. {asked.capitalize()}"
            case "mmlu":
                original = {"question": asked, "choices": choices, "answer": gold}
                options = [f"{a}. {choice}" for a, choice in zip(LETTERS, choices, strict=True)]
                query = "\n".join([MMLU_BEGINS, "", asked, *options, "Answer:"])
                choices = LETTERS
        yield original, {"query": query, "choices": choices, "gold": gold}


@pytest.fixture(scope="module")
def task_data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for task, file in FILES.items():
        lines = [json.dumps(ours) for _, ours in _documents(task)]
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
def one_index(stock_tasks, monkeypatch) -> None:
    """Give that index to whoever would make another one."""

    def manager(include_defaults: bool = True, **options: Any) -> TaskManager:
        return stock_tasks if include_defaults else TaskManager(include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


@pytest.mark.parametrize("task", FILES)
def test_text_and_choices_are_those_of_the_harness(task, task_data, stock_tasks, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([original for original, _ in _documents(task)])
    splits = datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    name = "mmlu_astronomy" if task == "mmlu" else task
    stock = stock_tasks.load([name])["tasks"][name]
    runner = TaskRunner.of(TaskSelection((task,), data=task_data))
    ours = runner.manager.load([task])["tasks"][task]
    assert _requests(ours) == _requests(stock)
    assert set(ours._metric_fn_list) == set(stock._metric_fn_list)
    assert task == "mmlu" or ours.VERSION == stock.VERSION


# One with choices of its own, one with the same of all, one with two contexts, one with one word.
SCORED = ("piqa", "boolq", "winogrande", "lambada_openai")


def test_numbers_are_exactly_the_harnesss_own(model, tokenizer, task_data, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    expected = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=list(SCORED),
        task_manager=TaskManager(
            include_path=JSONL_TASKS, include_defaults=False, metadata={"directory": str(task_data)}
        ),
        bootstrap_iters=2,
    )["results"]
    monkeypatch.delenv("DISABLE_MULTIPROC")
    # A fork of many threads can hang.
    monkeypatch.setattr("multiprocessing.Pool", None)
    runner = TaskRunner.of(TaskSelection(SCORED, data=task_data))
    scorer = runner.scorer(load(model, dtype="float32"), tokenizer)
    right = 0.0
    for task in SCORED:
        scored = scorer(task)
        (scores,), (documents,) = scored["tasks"].values(), scored["documents"].values()
        right += scores["acc"]
        assert (scores["documents"], scores["shots"]) == (DOCUMENTS, 0)
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert scores.get(metric) == expected[task].get(f"{metric},none")
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
        for each in documents:
            assert each["choice"] == int(np.argmax(each["loglikelihoods"]))
            assert each["acc"] == (each["choice"] == each["gold"])
            if "acc_norm" in each:
                assert each["acc_norm"] == (each["choice_norm"] == each["gold"])
        # Of boolq all documents have the same choices: one can say the same to each.
        yes = sum(document["gold"] for document in documents) / DOCUMENTS
        assert scores["chance"] == pytest.approx(max(yes, 1 - yes) if task == "boolq" else 0.5)
    # A random model on random text is right now and then, not always and not never.
    assert 0 < right < len(SCORED)


def test_a_task_that_says_what_its_accuracy_is_keeps_it():
    """As TruthfulQA does, whose target is only a dummy."""
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        multiple_input=0,
        config=SimpleNamespace(task="mc2"),
        doc_to_choice=lambda doc: ["yes", "no"],
        doc_to_target=lambda doc: 0,
    )
    logged = [
        {"filter": "none", "doc_id": number, "doc_hash": 16 * "a", "doc": {}, "acc": acc,
         "filtered_resps": [(-1.0, False), (-2.0, False)]}
        for number, acc in enumerate((0.75, 0.5))
    ]  # fmt: skip
    documents = scored_documents([(task, logged)])
    assert [document["acc"] for document in documents] == [0.75, 0.5]
    assert summary_of(documents)["chance"] is None
    for sample in logged:
        sample["acc"] = 1.0
    assert summary_of(scored_documents([(task, logged)]))["chance"] == 1.0


@pytest.mark.parametrize("metric", ["exact_match", "acc"])
def test_written_answers_are_known_whatever_says_that_they_are_right(metric):
    """The mathematics of AGIEval have `acc`: two models had nothing in common, and no table."""
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(task="math"))
    sample = {"filter": "none", "doc_id": 0, "doc_hash": "a", "filtered_resps": ["7"], metric: 1}
    (document,) = scored_documents([(task, [sample])])
    assert (document["acc"], document["chance"], document["answer"]) == (1.0, 0.0, "7")


def test_second_model_is_scored_as_if_it_were_the_first(tiny_checkpoint, tokenizer, task_data):
    runner = TaskRunner.of(TaskSelection(("piqa",), limit=4, data=task_data))
    first, other, again = (
        runner.scorer(load(tiny_checkpoint(name)), tokenizer)("piqa")
        for name in ("llama", "qwen3", "llama")
    )
    assert first == again
    assert other != first


def test_what_is_longer_than_the_model_reads_is_told(tiny_checkpoint, tokenizer, tmp_path, caplog):
    (tmp_path / "piqa.jsonl").write_text(
        json.dumps({"query": "a", "choices": ["b", "b" * 600], "gold": 0}) + "\n"
    )
    runner = TaskRunner.of(TaskSelection(("piqa",), data=tmp_path))
    score = runner.scorer(load(tiny_checkpoint("llama")), tokenizer)
    with pytest.raises(TaskError, match=r"piqa has .* a choice of more than the 256 tokens"):
        score("piqa")
    assert not caplog.text
    (tmp_path / "piqa.jsonl").write_text(
        json.dumps({"query": "a" * 600, "choices": ["b", "c"], "gold": 0}) + "\n"
    )
    score("piqa")
    assert "piqa: 2 times the beginning was left out of more than the 256 tokens" in caplog.text


def test_shots_and_limit_reach_the_harness_which_asks_git_nothing(
    tiny_checkpoint, tokenizer, task_data, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    runner = TaskRunner.of(TaskSelection(("winogrande",), limit=5, shots=2, data=task_data))
    found = runner.scorer(load(tiny_checkpoint("llama")), tokenizer)("winogrande")
    scores = found["tasks"]["winogrande"]
    assert (scores["shots"], scores["documents"]) == (2, 5)
    conditions = runner.conditions()
    assert (conditions["limit"], conditions["shots"]) == (5, 2)
    assert conditions["harness"].startswith("lm-evaluation-harness 0.")
    assert "git" not in capfd.readouterr().err
    # A question is no solved example of itself.
    for shots in (2, DOCUMENTS - 1):
        TaskRunner.of(TaskSelection(("winogrande",), shots=shots, data=task_data)).read_data()
    with pytest.raises(TaskError, match=rf"winogrande has no {DOCUMENTS} solved .*fewer --shots"):
        TaskRunner.of(TaskSelection(("winogrande",), shots=DOCUMENTS, data=task_data)).read_data()


def test_a_selection_has_a_task_and_the_paper_suite_is_one_name():
    with pytest.raises(UsageError, match="at least one task"):
        TaskSelection(())
    assert TaskSelection(("cfsp-paper",)).task_names == list(PAPER_SUITE)
    assert TaskSelection(("piqa", "cfsp-paper")).task_names[0] == "piqa"
    assert len(PAPER_SUITE) == 8
    # Every one of them is a task or group of the installed harness.
    TaskRunner.of(TaskSelection(("cfsp-paper",)))


def test_an_interrupted_run_goes_on_with_the_next_task(
    tiny_checkpoint, text_file, task_data, tmp_path, noted, capsys, command
):
    models = [str(tiny_checkpoint(name)) for name in ("llama", "qwen2")]
    argv = ["eval", *models, "--tasks", "piqa,lambada_openai", "--task-data", str(task_data)]
    argv += ["--limit", "4", "--dtype", "float32", "--data", str(text_file), "--windows", "2"]
    argv += ["--seqlen", "32"]
    whole = json.loads(command(*argv, "--json").out)
    first, second = whole["models"]
    assert set(first["tasks"]) == set(second["documents"]) == {"piqa", "lambada_openai"}
    assert first["tasks"]["piqa"]["version"] == 1.0
    assert "acc_norm" in first["tasks"]["piqa"]
    assert "acc_norm" not in first["tasks"]["lambada_openai"]
    perplexity = first["perplexity"][str(text_file)]
    assert perplexity["tokens"] == 2 * 31
    assert (perplexity["seqlen"], first["dtype"]) == (32, "float32")
    assert whole["tasks"]["limit"] == 4

    out = tmp_path / "out.json"
    for count, status, scored in ((3, 130, 3), (0, 0, 2), (0, 0, 0)):
        seen = noted(TaskRunner, "score", lambda *given: given[-1], count)
        assert main([*argv, "--out", str(out)]) == status
        assert len(seen) == scored and out.exists() == (status == 0)
    found = read_json(out)
    assert {key: found[key] for key in whole} == whole
    assert entries(tmp_path) == {"out.json"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*short_names(models).values()]
    for name in ("piqa, acc ", "piqa, acc_norm", "lambada_openai, loss, nats"):
        assert next(line for line in lines if line.startswith(name)).count("±") == 2
    assert "Tasks: 4 documents" in lines


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_cannot_be_reached_is_told_before_any_data_are_asked_for(monkeypatch, command):
    monkeypatch.setattr(TaskManager, "load", never)
    # A misspelt name is not the hub's fault.
    with pytest.raises(TaskError, match="harness has no task 'piqaa'"):
        TaskRunner.of(TaskSelection(("piqaa",)))
    told = command("eval", "no/such/model", "--tasks", "piqa,arc_easy", status=2).err
    assert "the hub, which has the data of piqa, arc_easy, cannot be reached from here" in told
    with pytest.raises(TaskError, match="give local files with --task-data"):
        TaskRunner.of(TaskSelection(("piqa",)))


def test_unknown_task_is_told_before_any_model_is_looked_for(task_data, command):
    argv = ["eval", "no/such/model", "--task-data", str(task_data), "--tasks"]
    assert "did you mean arc_easy" in command(*argv, "arc_esy", status=2).err
    assert "did you mean cfsp-paper?" in command(*argv, "cfsp-papr", status=2).err
    assert "it has, for example: hellaswag, piqa, " in command(*argv, "zzz", status=2).err


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_one_where_its_mean_is_that_of_its_documents(
    by_size, tiny_checkpoint, tokenizer, task_data, tmp_path
):
    """Else its pairs would be of another number than its score."""
    lines = (task_data / "piqa.jsonl").read_text().splitlines(keepends=True)
    for name, count in (("many", 12), ("few", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[-count:]))
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {JSONL_TASKS / 'piqa.yaml'}\ntask: {name}\n"
            f"metadata: {{version: 1.0, file: {name}.jsonl}}\n"
        )
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [many, few]\n"
        f"aggregate_metric_list: [{{metric: acc, weight_by_size: {by_size}}}]\n"
    )
    where = {"include_path": tmp_path, "metadata": {"directory": str(tmp_path)}}
    manager = TaskManager(include_defaults=False, **where)
    runner = TaskRunner(TaskSelection(("both",), data=tmp_path), manager)
    found = runner.scorer(load(tiny_checkpoint("llama")), tokenizer)("both")
    accuracy = {
        name: fmean(each["acc"] for each in documents)
        for name, documents in found["documents"].items()
    }
    assert accuracy == pytest.approx({name: each["acc"] for name, each in found["tasks"].items()})
    assert accuracy.keys() == ({"both"} if by_size else {"many", "few"})
    # What a group does not give in the mean, its pairs do not compare.
    normed = ["acc_norm" in each for some in found["documents"].values() for each in some]
    assert normed == [not by_size] * 15


def test_shots_that_a_task_does_not_take_are_told(runner_of, caplog):
    runner = runner_of("odds", "piqa", "num_fewshot: 0")
    replace(runner, selection=replace(runner.selection, shots=1)).read_data()
    assert "odds: 1 of its tasks take no solved examples" in caplog.text


MCC = "metric_list: [{metric: mcc, aggregation: matthews_corrcoef}]"
PERPLEXITY = "metric_list: [{metric: perplexity, aggregation: perplexity}]"
FILTER = "filter_list: [{name: own, filter: [{function: take_first}]}]"


@pytest.fixture
def runner_of(task_data, tmp_path) -> Callable[..., TaskRunner]:
    """Runs `odd` like a task but for some lines, and with its tag `odds` also the task itself."""

    def of(name: str, like: str, more: str) -> TaskRunner:
        text = f"include: {JSONL_TASKS / f'{like}.yaml'}\ntag: odds\ntask: "
        (tmp_path / "odd.yaml").write_text(f"{text}odd\n{more}\n")
        (tmp_path / "even.yaml").write_text(f"{text}even\n")
        where = {"include_path": tmp_path, "metadata": {"directory": str(task_data)}}
        manager = TaskManager(include_defaults=False, **where)
        return TaskRunner(TaskSelection((name,), data=task_data), manager)

    return of


@pytest.mark.parametrize(
    ("like", "more", "found"),
    [
        ("lambada_openai", PERPLEXITY, "odd by perplexity of answers taken by none;"),
        ("piqa", FILTER, "acc_norm of answers taken by own;"),
    ],
)
def test_a_task_without_a_number_that_is_read_is_told_before_a_model_is_loaded(
    like, more, found, tiny_checkpoint, runner_of, monkeypatch, caplog
):
    """It ended without any, and comparing it in a traceback."""
    monkeypatch.setattr(evaluate, "load", never)
    exam = Exam(EvaluationText(()), Compute(), runner_of("odd", like, more))
    with pytest.raises(TaskError, match=f"expected scores by acc or .*{found}.* leave odd out"):
        evaluate_models([tiny_checkpoint("llama")], exam)
    # Of several the others have theirs.
    runner_of("odds", like, more).read_data()
    assert re.search(f"odds: expected .*, found .*{found} these get no number$", caplog.text, re.M)


def test_choices_are_compared_whatever_they_are_scored_by(tiny_checkpoint, runner_of, caplog):
    """CoLA is scored by Matthews' correlation alone."""
    exam = Exam(EvaluationText(()), Compute(), runner_of("odd", "piqa", MCC))
    models = [tiny_checkpoint(name) for name in ("llama", "qwen2")]
    results = evaluate_models(models, exam)
    assert "odd by mcc of answers taken by none; these get no number, but choices" in caplog.text
    dense, other = (measured_model("results", each) for each in results)
    found = compare(dense, other, dense)["tasks"]["odd"]
    assert 0 <= found["accuracy"]["second"]["value"] <= 1


def test_models_too_large_are_told_before_any_pass(model, text_file, task_data, monkeypatch):
    monkeypatch.setattr(evaluate, "streamed_sums", never)
    texts = EvaluationText((str(text_file),), 2, 32)
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    runner = TaskRunner.of(TaskSelection(("piqa",), data=task_data))
    with pytest.raises(UsageError, match="scoring tasks runs the whole model, which takes about"):
        evaluate_models([model], Exam(texts, Compute(), runner))


def test_scores_depend_on_what_is_in_the_files(task_data, tmp_path):
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
        ('{"query": "a", "choices": ["b"]}', r"expected query \(text\), choices \(list\), gold"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1, but there are 1 choices"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "a choice is empty"),
        ("[]", "found: list"),
        ('{"text": "a word"}', "line 1: expected query .*; found: text"),
        ("", "holds no documents"),
    ],
)
def test_damaged_task_file_is_one_sentence(line, message, tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TaskError, match=message):
        read_documents(path)


def test_a_task_file_is_text_that_may_begin_with_a_mark(tmp_path):
    """As files that Windows wrote."""
    path = tmp_path / "piqa.jsonl"
    document = {"query": "a", "choices": ["b", "c"], "gold": 0}
    path.write_text(json.dumps(document), encoding="utf-8-sig")
    assert read_documents(path) == [document]
    path.write_text(json.dumps(document | {"query": "\ud800"}))
    with pytest.raises(TextError, match=r"piqa.jsonl, line 1: half of a surrogate pair"):
        read_documents(path)


def test_what_is_wrong_with_a_file_is_told_before_any_pass(
    model, text_file, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(evaluate, "streamed_sums", never)
    argv = ["eval", model, "--data", text_file, "--windows", 1, "--task-data", tmp_path, "--tasks"]
    missing = f"cannot read the task file {tmp_path / 'piqa.jsonl'}"
    assert missing in command(*argv, "piqa", status=2).err
    lines = {
        "lambada": ('{"text": "word"}', "whose last word follows a space, found 'word'"),
        "winogrande": ('{"text": "a word"}', r"line 1: expected context_options (list), cont"),
        "piqa": ('{"text": "a word"}', "line 1: expected query (text), choices (list), gold"),
    }
    for name, (line, message) in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(line)
        task = "lambada_openai" if name == "lambada" else name
        assert message in command(*argv, task, status=2).err
    absent = ("--task-data", tmp_path / "absent")
    assert "does not exist" in command(*argv, "piqa", *absent, status=2).err
    a_file = ("--task-data", tmp_path / "piqa.jsonl")
    assert "is no directory" in command(*argv, "piqa", *a_file, status=2).err
