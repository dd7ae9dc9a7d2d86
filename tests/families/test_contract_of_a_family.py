from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from cfsp.families import stock
from cfsp.families.catalogue import Family
from cfsp.families.contract import (
    Contract,
    begin_contract,
    judged,
    no_tiny_model,
    prune_tiny,
    question_of,
    save_with_tokenizer,
    tiny_model_of,
    tiny_text,
    tiny_tokenizer,
)
from cfsp.families.stock import Question, ask

LLAMA = Family("llama", "LlamaForCausalLM")
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_what_the_dense_model_fails_too_is_not_held_against_the_type() -> None:
    def never() -> dict[str, str]:
        raise AssertionError("the dense model need not be asked")

    assert judged({}, never) == Contract("passed")
    notes = {"base": "others", "adapters": "none"}
    excuse = "the dense model fails as well: no names"
    found = judged(notes, lambda: {"adapters": "no names", "saved": "others"})
    assert found == Contract("failed", {"base": "others", "adapters": excuse})
    found = judged({"adapters": "none"}, lambda: {"adapters": "no names"})
    assert found == Contract("passed", {"adapters": excuse})
    found = judged(notes, lambda: {"logits": "others"})
    assert found == no_tiny_model("transformers does not read back what it saved (others)")


def test_a_type_that_stock_software_cannot_run(tmp_path: Path) -> None:
    family = Family("mamba", "NoSuchClass")
    found = begin_contract(family, tmp_path)
    assert found is not None
    assert found.result == "not run"
    assert "NoSuchClass" in found.notes["tiny model"]


@pytest.fixture(autouse=True)
def modules_cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ask` has a process to itself elsewhere, and sets this."""
    monkeypatch.setattr(
        dynamic_module_utils, "HF_MODULES_CACHE", dynamic_module_utils.HF_MODULES_CACHE
    )


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    place = tmp_path_factory.mktemp("contract")
    dense = tiny_model_of(LLAMA)
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
