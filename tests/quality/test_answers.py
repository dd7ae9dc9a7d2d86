"""Answers: greedy whatever a model says, read by all models alike, and never asked twice."""

import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import AddedToken, GenerationConfig

import cfsp
from builders import edit_json, entries, never, numpy_divergence, read_json
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import TextError, UsageError
from cfsp.quality import answers, evaluate
from cfsp.quality.answers import Questions, answers_of, is_loop, windows_of
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.records import templated

COUNT, LONGEST = 9, 7


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfsp.quality.answers.ANSWER_TOKENS", LONGEST)
        patch.setattr("cfsp.quality.answers._BATCH", 8)
        yield


@pytest.fixture(scope="module")
def models(tiny_checkpoint) -> list[str]:
    return [str(tiny_checkpoint(name)) for name in ("qwen3", "llama")]


@pytest.fixture(scope="module")
def argv(models, text_file, other_text_file) -> list[str]:
    """Another model of the same tokenizer, measured against the dense one, on texts as well."""
    asked = ["--data", str(text_file), "--data", str(other_text_file), "--windows", "3"]
    asked += ["--seqlen", "24", "--dtype", "float32"]
    asked += ["--answers", str(COUNT)]
    return ["eval", models[0], "--against", models[1], *asked]


@pytest.fixture(scope="module")
def results(argv, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "out.json"
    assert main([*argv, "--out", str(out)]) == 0
    return out


def prompts_of(tokenizer: Any) -> list[list[int]]:
    texts = [templated(asked, tokenizer, 1) for _, asked in Questions.of(COUNT).asked]
    prompts: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return prompts


def greedy(model: Any, prompt: list[int], end: int) -> list[int]:
    """Answer without a cache, and without `generate`."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + LONGEST and tokens[-1:] != [end]:
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_numbers_are_those_of_numpy(models, results, tokenizer):
    dense, other = (load(name, dtype="float32") for name in reversed(models))
    end = tokenizer.eos_token_id
    kl, agreed, counts, alike, texts = [], [], [], [], []
    for prompt in prompts_of(tokenizer):
        answer, own = greedy(dense, prompt, end), greedy(other, prompt, end)
        with torch.inference_mode():
            p, q = (
                model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                for model in (dense, other)
            )
        kl.append(numpy_divergence(p, q).sum())
        agreed.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
        counts.append(len(answer))
        alike.append(int(np.cumprod([a == b for a, b in zip(answer, own, strict=False)]).sum()))
        texts.append(tokenizer.decode([token for token in own if token != end]).strip())
    first, second = (each["answers"] for each in read_json(results)["models"])
    assert second["predicted"] == first["predicted"] == counts
    assert second["divergence"] == pytest.approx(kl, rel=1e-3)
    assert second["agreed"] == agreed
    assert [each["answer"] for each in second["documents"]] == texts
    assert [each["alike"] for each in second["documents"]] == alike
    value = second["summary"]["divergence"]
    assert value["value"] == pytest.approx(sum(kl) / sum(counts), rel=1e-3)
    gaps = np.array(kl) - sum(kl) / sum(counts) * np.array(counts)
    error = np.sqrt(COUNT / (COUNT - 1) * (gaps**2).sum()) / sum(counts)
    assert value["stderr"] == pytest.approx(error, rel=1e-2)
    # The dense model is as it is.
    assert first["divergence"] == [0] * COUNT and first["agreed"] == counts
    assert [each["alike"] for each in first["documents"]] == counts


def test_answers_are_greedy_and_padding_changes_none(models, tokenizer, monkeypatch):
    prompts = prompts_of(tokenizer)
    assert len({len(prompt) for prompt in prompts}) > 1
    model = load(models[1], dtype="float32")

    def ask(model: Any) -> list[dict[str, Any]]:
        return answers_of(prompts, lambda: (model, tokenizer), WorkDir(Path()), "name", "label")

    expected = [greedy(model, prompt, tokenizer.eos_token_id) for prompt in prompts]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, num_beams=2,
        eos_token_id=[1, expected[0][3]],
    )  # fmt: skip
    found = ask(model)
    # What the model's own config ends a turn with ends it.
    stop = expected[0].index(expected[0][3])
    assert found[0]["tokens"] == expected[0][: stop + 1] and found[0]["stops"]
    for each, its in zip(found, expected, strict=True):
        assert each["tokens"] == its[: len(each["tokens"])]
    monkeypatch.setattr("cfsp.quality.generation._MOST_OF_PADDING", -1.0)  # one question at a time
    model.generation_config = GenerationConfig(eos_token_id=[1, expected[0][3]])
    assert ask(model) == found


def test_the_token_by_which_the_template_ends_a_turn_ends_an_answer(models, tokenizer):
    """Also where the config names another one alone, as in many copies of Gemma."""
    model, prompts = load(models[1], dtype="float32"), prompts_of(tokenizer)[:1]
    first, second, *_ = greedy(model, prompts[0], -1)
    ends = deepcopy(tokenizer)
    end = ends.convert_ids_to_tokens(second)
    ends.add_tokens([AddedToken(end, normalized=False)])
    ends.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    (found,) = answers_of(prompts, lambda: (model, ends), WorkDir(Path()), "name", "label")
    assert found["tokens"] == [first, second] and found["stops"]


def test_python_measures_them_too(models, monkeypatch):
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 2)
    dense, other = cfsp.evaluate(models[0], answers=2, against=models[1])
    assert dense["answers"]["summary"]["agreed"]["value"] == 1
    assert len(other["answers"]["documents"]) == 2


def test_the_dense_model_alone_is_told_of_too(models, command):
    said = command("eval", models[1], "--against", models[1], "--answers", COUNT).out
    whole = command("eval", models[0], "--against", models[1], "--answers", COUNT).out
    row = re.search(r"answers that end, percent +([\d.]+ ± [\d.]+)", whole)
    assert row and f"answers that end: {row[1]}%; that repeat 4 tokens 4 times: " in said


def test_loops_and_windows_are_counted():
    assert is_loop([5, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    assert not is_loop([5, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3])
    assert is_loop([7] * 7) and not is_loop([7] * 6) and not is_loop([])
    windows = windows_of([[1, 2], [3]], [{"tokens": [4]}, {"tokens": [5, 6, 7]}])
    assert windows.tokens_NT.tolist() == [[1, 2, 4, 4], [3, 5, 6, 7]]
    assert windows.scored_N.tolist() == [1, 3]
    part = windows.part(slice(0, 1))
    assert part.padding_N is not None and part.padding_N.tolist() == [1]


def test_first_questions_are_of_every_kind():
    asked = Questions.of(100).asked
    assert len({chat[0]["content"] for _, chat in asked}) == 100
    kinds = [kind for kind, _ in asked]
    assert len(set(kinds)) == 10 and kinds == kinds[:10] * 10


def test_a_killed_run_goes_on(argv, models, other_text_file, results, tmp_path, noted, capsys):
    """At the fourth pass over a text, then at the second batch of questions."""
    seen: list[Any] = []
    out = tmp_path / "new" / "out.json"

    def run(*more: str, passes: int = 0, batches: int = 0) -> int:
        seen.clear()
        noted(evaluate, "streamed_sums", lambda *given, **_: given[-1], passes, seen)
        noted(answers, "_greedy", lambda *given: len(given[-1]), batches, seen)
        return main([*argv, "--out", str(out), *more])

    assert run(passes=4) == 130 and not out.exists()
    # Another command is told so.
    assert run("--windows", "2") == 2
    assert "holds unfinished work that differs in texts; repeat" in capsys.readouterr().err
    # The first text is there, and of the second the dense model: it streams once more, to compare
    # the other with.
    assert run(batches=4) == 130
    assert seen == [*(f"{models[i]} on {other_text_file}" for i in (1, 0)), 8, 1]
    bars = noted(tqdm, "__exit__", lambda bar, *_: (bar.unit, bar.initial))
    assert run() == 0
    # The time left is not by what was only read.
    assert [each for unit, each in bars if unit == "answer"] == [8, 0]
    assert seen == [1, 8, 1, *(f"{models[i]} on answers" for i in (1, 0))]
    assert entries(out.parent) == {"out.json"}
    assert read_json(out) == read_json(results)
    # What is there is not measured again, unless something else is asked.
    capsys.readouterr()
    assert run("--json") == 0 and not seen
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"models": read_json(out)["models"]}
    assert run("--windows", "2") == 2 and not seen
    assert "holds something else than was asked for now (other texts)" in capsys.readouterr().err
    assert run("--answers", "3") == 2 and not seen


def test_tables(argv, results, command):
    lines = command(*argv, "--out", results).out.splitlines()
    row = next(line for line in lines if line.startswith("KL per token on the original's answers"))
    assert row.count("±") == 1 and f" {COUNT} questions" in "\n".join(lines)
    (pair,) = json.loads(command("compare", results, "--json").out)["pairs"]
    second = read_json(results)["models"][1]["answers"]["summary"]
    assert pair["questions"] == COUNT
    assert pair["answers"]["divergence"]["difference"] == second["divergence"]
    assert pair["answers"]["alike"]["second"] == second["alike"]
    told = command("compare", results).out
    assert f"answers to {COUNT} questions" in told and "first tokens alike" in told


def test_other_answers_are_not_compared(results, tmp_path, command):
    found = read_json(results)
    found["models"] = [found["models"][1] | {"model": "other", "fingerprint": "other"}]
    found["models"][0]["answers"]["digest"] = "other"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    assert "were measured on other answers" in command("compare", results, other, status=2).err


def test_answers_of_another_dense_model_are_not_the_original_s(results, models, command):
    """The one that is named gave none of them: how far both are from it is not known."""
    (pair,) = json.loads(command("compare", results, "--against", models[0], "--json").out)["pairs"]
    known = {name for name, each in pair["answers"].items() if each is not None}
    assert known == {"stops", "loops"} and pair["answers"]["alike"] is None
    assert pair["questions"] == COUNT
    assert "KL per token" not in command("compare", results, "--against", models[0]).out


def test_questions_of_chats(tmp_path):
    chats = tmp_path / "mine.jsonl"
    turns = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": f"river {i}"}]
        for i in range(4)
    ]
    answered = {"role": "assistant", "content": "yes"}
    chats.write_text("\n".join(json.dumps({"messages": [*each, answered]}) for each in turns))
    assert Questions.of(str(chats)).asked == tuple(("mine", turn) for turn in turns)
    chats.write_text(json.dumps({"messages": turns[0][:1]}))
    with pytest.raises(TextError, match="chat 1: there is no message of the role `user`"):
        Questions.of(str(chats))
    chats.write_text(json.dumps({"text": "prose"}))
    with pytest.raises(TextError, match="holds no chats"):
        Questions.of(str(chats))
    chats.write_text("")
    with pytest.raises(TextError, match="holds no chats"):
        Questions.of(f"{chats}:messages")
    with pytest.raises(UsageError, match=r"a number of questions, of which 100 .* found True"):
        Questions.of(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "asks in the chat template, and the tokenizer of"),
        ({"chat_template": "{{ messages[0].content }}!"}, "another tokenizer or chat template"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "does not fit the chat template: no"),
        ({"pad_token": "<new>", "chat_template": "<new>"}, "the tokenizer gives token id 320, but"),
        # A template cannot reach what is outside of it.
        ({"chat_template": "{{ messages.__class__.__mro__ }}"}, "does not fit the chat template"),
    ],
)
def test_templates_that_do_not_fit(models, change, message, tmp_path, command):
    other = Path(shutil.copytree(models[1], tmp_path / "other"))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(other / "tokenizer_config.json", lambda fields: fields.update(change))
    assert message in command("eval", other, "--against", models[1], "--answers", "1", status=2).err


def test_a_model_that_thinks_answers_at_once(models, tokenizer):
    """The tokens of an answer are not spent on thoughts."""
    thinks = "{{ '' if enable_thinking is false else '<think>' }}"
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}" + thinks
    questions, source = Questions.of(1), Checkpoint(Path(models[0]))
    (prompt,) = questions.prompts(source, tokenizer)
    asked = questions.asked[0][1][-1]["content"]
    assert prompt == tokenizer(asked, add_special_tokens=False)["input_ids"]


def test_mistakes_are_told_before_anything_is_loaded(models, argv, command, monkeypatch):
    monkeypatch.setattr("cfsp.quality.evaluate.load", never)
    for wrong, message in (
        (["eval", models[0], "--answers"], "add --against DENSE"),
        ([*argv, "--answers", "nowhere.jsonl"], "nowhere.jsonl does not exist; give a .jsonl or"),
    ):
        assert message in command(*wrong, status=2).err
    with monkeypatch.context() as patch:
        patch.setattr("cfsp.quality.answers.ANSWER_TOKENS", 999)
        told = r"question 1 has \d+ tokens and its answer up to 999, but .*; leave it out"
        assert re.search(told, command(*argv, status=2).err)
    error = command("eval", "--against", models[1], "--answers", models[0], status=2).err
    assert "a number of questions or a .jsonl file, with the models before --answers" in error
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    assert "answering questions runs the whole model" in command(*argv, status=2).err
    with pytest.raises(UsageError, match="at least 1 question, found 0"):
        Questions.of(0)
    with pytest.raises(UsageError, match="100 questions come with cfsp, found --answers 101"):
        Questions.of(101)
