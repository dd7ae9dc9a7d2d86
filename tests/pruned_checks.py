"""What holds of every pruned checkpoint of a tiny model, whichever parts went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cfsp
from builders import tensors
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.cli import main
from cfsp.cut.in_memory import build_pruned_model
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.prune_report import PruneReport
from cfsp.settings import Budget, CalibrationText, Compute, LocalTraining, PruneSettings, Repair
from family_contract import (
    assert_same,
    fresh_answer,
    question_of,
    save_with_tokenizer,
    tokens_of_question,
)
from forks import Forks
from stock import Question, logits_of
from tiny_decoders import tiny_model

# Of a calibration that a tiny model needs.
SETTINGS: dict[str, Any] = {"samples": 6, "seqlen": 32, "device": "cpu"}


@dataclass(frozen=True)
class Case:
    """A tiny model and its checkpoint, and what pruning without repair leaves of it."""

    dense: Any
    source: Path
    out: Path
    report: PruneReport
    asked: dict[str, Any]

    @cached_property
    def question(self) -> Question:
        """What to ask of the checkpoint, with what the masked model computes."""
        return question_of(self.dense, self.out, self.report.plan)

    @property
    def tokens_BT(self) -> Tensor:
        return tokens_of_question()

    @property
    def removed_attentions(self) -> list[int]:
        return list(self.report.plan.removed_attentions)


def pruned_case(
    name: str, config: dict[str, Any], tokenizer: Any, place: Path, asked: dict[str, Any]
) -> Case:
    """Save and prune a tiny model of a type in a directory of its own."""
    asked = {**SETTINGS, **asked}
    dense = tiny_model(name, **config)
    source, out = place / "dense", place / "out"
    save_with_tokenizer(dense, tokenizer, source)
    report = cfsp.prune(source, out=out, repair="none", **asked)
    return Case(dense, source, out, report, asked)


def by_plan(
    dense: Path, plan: PruningPlan, out: Path, text: Path, repair: Repair = "none"
) -> PruneReport:
    """Prune by a plan, and repair on a little text."""
    settings = PruneSettings(
        Budget(),
        text=CalibrationText((str(text),), samples=6, seqlen=32),
        compute=Compute("cpu"),
        repair=repair,
        local=LocalTraining(steps=1),
    )
    return prune_checkpoint(Checkpoint(dense, parts=plan.parts), out, settings, plan=plan)


def check_masked_is_cut(case: Case) -> None:
    """What the dense model computes with masks in the place of what went is what is left."""
    expected = case.question.expected["logits"]
    actual = logits_of(cfsp.load(case.out), case.tokens_BT)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # The mask bites.
    assert (expected - logits_of(case.dense, case.tokens_BT)).abs().max() > 1e-2


def check_is_the_same(source: Path, out: Path) -> None:
    assert_same(tensors(out), tensors(source))
    first, second = (json.loads((at / "config.json").read_text()) for at in (source, out))
    assert first == second


def check_its_plan_gives_the_same(case: Case, work: Path) -> None:
    """Prune by the plan that was written, with the command."""
    plan = case.out / "cfsp_plan.json"
    assert PruningPlan.load(plan) == case.report.plan
    asked = ["--plan", str(plan), "--repair", "none", "--out", str(work / "by-plan")]
    assert main(["prune", str(case.source), *asked]) == 0
    check_is_the_same(case.out, work / "by-plan")


def generated(model: Any, tokens_BT: Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.generate(
            tokens_BT,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            **{"attention_mask": torch.ones_like(tokens_BT), **options},
        )
    return found


def check_caches_agree_with_none(case: Case) -> None:
    model, tokens_BT = cfsp.load(case.out), case.tokens_BT
    expected = generated(model, tokens_BT, use_cache=False)
    assert torch.equal(generated(model, tokens_BT), expected)
    if not (case.removed_attentions or case.report.plan.of_part("kv")):
        return
    assert torch.equal(generated(model, tokens_BT, cache_implementation="static"), expected)
    for tokens_T, expected_T in zip(tokens_BT, expected, strict=True):
        assert torch.equal(generated(model, tokens_T[None])[0], expected_T)


def check_a_fresh_process_keeps_the_contract(case: Case, forks: Forks, work: Path) -> None:
    assert not case.question.failed
    answer = fresh_answer(case.question, forks, work)
    assert not answer.problems
    assert torch.equal(answer.tensors["logits"], logits_of(cfsp.load(case.out), case.tokens_BT))


def check_in_memory_is_the_checkpoint(case: Case, work: Path) -> None:
    plan = case.report.plan
    pruned = build_pruned_model(case.dense, LoadedModel(case.dense, plan.parts), plan, {})
    assert_same(pruned.state_dict(), cfsp.load(case.out).state_dict())
    pruned.save_pretrained(work / "saved")
    again = cfsp.load(work / "saved")
    assert torch.equal(logits_of(again, case.tokens_BT), logits_of(pruned, case.tokens_BT))
