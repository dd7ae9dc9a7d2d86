from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

import stock
from family_contract import (
    held_against,
    prune_tiny,
    question_of,
    save_with_tokenizer,
    tiny_text,
    tiny_tokenizer,
)
from stock import Question, ask
from tiny_decoders import tiny_model

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_what_the_dense_model_fails_too_is_not_held_against_the_type() -> None:
    def never() -> dict[str, str]:
        raise AssertionError("the dense model need not be asked")

    assert held_against({}, never) == {}
    problems = {"base": "others", "adapters": "none"}
    assert held_against(problems, lambda: {"adapters": "no names"}) == {"base": "others"}
    assert held_against({"logits": "others"}, lambda: {"logits": "others"}) == {"logits": "others"}


@pytest.fixture(autouse=True)
def modules_cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ask` has a process to itself elsewhere, and sets this."""
    monkeypatch.setattr(
        dynamic_module_utils, "HF_MODULES_CACHE", dynamic_module_utils.HF_MODULES_CACHE
    )


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    place = tmp_path_factory.mktemp("contract")
    dense = tiny_model("llama")
    save_with_tokenizer(dense, tiny_tokenizer(), place / "dense")
    report = prune_tiny(place / "dense", place / "pruned", [tiny_text()], 1)
    question_of(dense, place / "pruned", report.plan).save(place / "question.pt")
    return Question.load(place / "question.pt")


@PEFT_WARNS
def test_every_check_can_fail(question: Question, tmp_path: Path) -> None:
    assert ask(question, tmp_path / "as it is").problems == {}

    wrong = {name: tensor + 1 for name, tensor in question.expected.items()}
    found = ask(
        replace(question, expected=wrong, class_name="OtherForCausalLM", matrices=["no.weight"]),
        tmp_path / "wrong",
    ).problems
    assert "PeftModule" in found.pop("adapters")
    assert found == {
        "loads": "expected the class PrunedOtherForCausalLM, found PrunedLlamaForCausalLM",
        "logits": "expected what the masked original computes, found a difference of 1.0e+00",
        "cache": "expected the tokens that the masked original generates, found others",
        "attention": "expected what the masked original computes, found a difference of 1.0e+00",
    }


def test_a_checkpoint_that_does_not_load_fails_every_check(
    question: Question, tmp_path: Path
) -> None:
    found = ask(replace(question, checkpoint=str(tmp_path / "nothing")), tmp_path).problems
    assert list(found) == ["loads"]


@PEFT_WARNS
def test_what_is_saved_must_be_the_same_bit_for_bit(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "TOLERANCE", 0.1)
    calls = iter(range(100))
    original = stock.logits_of
    monkeypatch.setattr(stock, "logits_of", lambda *args: original(*args) + 1e-3 * next(calls))
    found = ask(question, tmp_path).problems
    assert found == {
        "saved": "expected the same logits of the model that was saved and read again, found others"
    }


def test_the_half_without_cfsp_imports_nothing_of_it() -> None:
    tree = ast.parse(Path(str(stock.__file__)).read_text(encoding="utf-8"))
    names = {
        name
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in (
            [statement.module or ""]
            if isinstance(statement, ast.ImportFrom)
            else [alias.name for alias in statement.names]
        )
    }
    assert not any(name.startswith("cfsp") for name in names)
    assert torch.__name__ in names
