"""What holds of every pruned checkpoint of a tiny model, whichever parts went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import cfsp
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.cli import main
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.prune_report import PruneReport
from cfsp.selection.divergence import call_form_of
from cfsp.settings import Budget, CalibrationText, Compute, LocalTraining, PruneSettings, Repair
from cfsp.streaming.stand_in import skipped
from family_contract import question_of, save_with_tokenizer
from forks import Forks, Job
from stock import Answer, logits_of
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
    tokens_BT: Tensor
    asked: dict[str, Any]

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
    return Case(dense, source, out, report, question_of(dense, source).tokens_BT, asked)


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


@contextmanager
def nothing_from(dense: Any, plan: PruningPlan) -> Iterator[None]:
    """Let the removed attentions of the dense model give zeros, and skip its removed blocks."""
    source = LoadedModel(dense, plan.parts)
    blocks = blocks_of(dense, source.architecture)

    def zeros(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    form = call_form_of(dense, blocks)
    with ExitStack() as stack:
        for unit in source.units:
            if unit.part == "kv" and unit.block in plan.removed_attentions:
                attention = blocks[unit.block].get_submodule(unit.path)
                stack.callback(attention.register_forward_hook(zeros).remove)
        stack.enter_context(skipped(blocks, plan.removed_blocks, form))
        yield


def check_is_the_same(source: Path, out: Path) -> None:
    before, after = (load_file(at / "model.safetensors") for at in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
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
    question_of(case.dense, case.out, case.report.plan).save(work / "question.pt")
    (finished,) = forks(Job("stock.check", {"directory": str(work)}))
    assert finished.status == 0, finished.stderr
    answer = Answer(**torch.load(work / "answer.pt"))
    assert not answer.problems
    assert torch.equal(answer.tensors["logits"], logits_of(cfsp.load(case.out), case.tokens_BT))


def check_in_memory_is_the_checkpoint(case: Case, pruned: Any, work: Path) -> None:
    expected = cfsp.load(case.out).state_dict()
    assert pruned.state_dict().keys() == expected.keys()
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    pruned.save_pretrained(work / "saved")
    again = cfsp.load(work / "saved")
    assert torch.equal(logits_of(again, case.tokens_BT), logits_of(pruned, case.tokens_BT))
