"""The contract of a pruned checkpoint: what to ask stock software of it, and what its answers mean.

The checks are those of `stock`, in a process without cfsp. Below is what holds of every pruned
checkpoint of a tiny model, whichever parts went.

Shapes: B windows, T tokens.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import cfsp
from builders import read_json, tensors
from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import auto_classes_of
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import architecture_of, blocks_of
from cfsp.cut.surgery import build_pruned_model
from cfsp.decide import Known
from cfsp.pipeline import prune_checkpoint
from cfsp.selection.divergence import call_form_of, masked_unit
from cfsp.settings import (
    DEFAULT_PARTS,
    Budget,
    CalibrationText,
    Compute,
    PruneSettings,
    Repair,
)
from cfsp.streaming.stand_in import skipped
from forks import Forks, Job
from stock import Answer, Question, computed, logits_of

SAMPLES, SEQLEN = 6, 32
# Ids that no type of a tiny model has a meaning for.
FIRST_TOKEN, LAST_TOKEN = 2, 290
WINDOWS, TOKENS = 2, 24
# Of a type that transformers does not read back there is nothing to ask.
NEVER_EXCUSED = ("loads", "logits")


def save_with_tokenizer(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write a model and its tokenizer as a checkpoint."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def question_of(
    dense: PreTrainedModel, checkpoint: Path, plan: cfsp.PruningPlan | None = None
) -> Question:
    """Return what to ask stock software of a checkpoint, dense or pruned by a plan."""
    # It takes another attention on the way.
    model = copy.deepcopy(dense)
    architecture = architecture_of(dense.config, plan.parts if plan else DEFAULT_PARTS)
    blocks = blocks_of(model, architecture)
    removed = plan.removed_blocks if plan else ()
    masks = zip(architecture.units, plan.kept_channels, strict=True) if plan else ()
    with ExitStack() as stack:
        for unit, kept_K in masks:
            if unit.block not in removed:
                stack.enter_context(masked_unit(blocks[unit.block], unit, kept_K))
        if removed:
            stack.enter_context(skipped(blocks, removed, call_form_of(model, blocks)))
        expected, failed = computed(model, tokens_of_question())
    return Question(
        checkpoint=str(checkpoint),
        auto_class=auto_classes_of(type(dense), type(dense.config))[0],
        class_name=type(dense).__name__,
        tokens_BT=tokens_of_question(),
        expected=expected,
        failed=failed,
        matrices=matrices_of(architecture.without_blocks(removed)),
    )


def tokens_of_question() -> Tensor:
    """Return the token ids to compute on (B x T), the same ones every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (WINDOWS, TOKENS), generator=generator)


def matrices_of(architecture: Architecture) -> list[str]:
    """Return the names of all FFN matrices in the model, gate and up in one once."""
    return [
        architecture.block_prefix(unit.block) + name
        for unit in architecture.of_part("ffn").units
        for name in dict.fromkeys(name for name in (unit.gate, unit.up, unit.down) if name)
    ]


def fresh_answer(question: Question, forks: Forks, work: Path) -> Answer:
    """Return what a fresh process without cfsp finds, in an empty directory."""
    torch.save(vars(question), work / "question.pt")
    (finished,) = forks(Job("stock.check", {"directory": str(work)}))
    assert finished.status == 0, finished.stderr
    return Answer(**torch.load(work / "answer.pt"))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare tensors by name, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


def held_against(
    problems: Mapping[str, str], of_dense: Callable[[], Mapping[str, str]]
) -> dict[str, str]:
    """Return the problems of the pruned checkpoint (check -> why) that the dense one has not."""
    also = of_dense() if problems else {}
    return {
        check: problem
        for check, problem in problems.items()
        if check not in also or check in NEVER_EXCUSED
    }


# Of a calibration that a tiny model needs.
SETTINGS: dict[str, Any] = {"samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu"}


@dataclass(frozen=True)
class Case:
    """A tiny model and its checkpoint, and what pruning without repair leaves of it."""

    dense: Any
    source: Path
    out: Path
    report: cfsp.PruneReport
    asked: dict[str, Any]

    @cached_property
    def question(self) -> Question:
        """What to ask of the checkpoint, with what the masked model computes."""
        return question_of(self.dense, self.out, self.report.plan)

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The checkpoint, loaded once for all tests that only look at it."""
        return cfsp.load(self.out)

    @cached_property
    def in_memory(self) -> PreTrainedModel:
        """What the plan leaves of the dense model in memory."""
        plan = self.report.plan
        return build_pruned_model(LoadedModel(self.dense, plan.parts), plan, {})

    @property
    def tokens_BT(self) -> Tensor:
        return tokens_of_question()

    @property
    def removed_attentions(self) -> list[int]:
        return list(self.report.plan.removed_attentions)


def pruned_case(dense: Any, tokenizer: Any, place: Path, asked: dict[str, Any]) -> Case:
    """Save and prune a tiny model in a directory of its own, without repair."""
    asked = {**SETTINGS, **asked}
    source, out = place / "dense", place / "out"
    save_with_tokenizer(dense, tokenizer, source)
    report = cfsp.prune(source, out=out, repair="none", **asked)
    return Case(dense, source, out, report, asked)


def by_plan(
    dense: Path, plan: cfsp.PruningPlan, out: Path, text: Path, repair: Repair = "none"
) -> cfsp.PruneReport:
    """Prune by a plan, and repair on a little text."""
    settings = PruneSettings(
        Budget(),
        text=CalibrationText((str(text),), samples=SAMPLES, seqlen=SEQLEN),
        compute=Compute("cpu"),
        repair=repair,
    )
    source = Checkpoint(dense, parts=plan.parts)
    return prune_checkpoint(source, out, settings, known=Known(plan=plan))


def check_masked_is_cut(case: Case) -> None:
    """What the dense model computes with masks in the place of what went is what is left."""
    expected = case.question.expected["logits"]
    actual = logits_of(case.loaded, case.tokens_BT)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # The mask bites.
    assert (expected - logits_of(case.dense, case.tokens_BT)).abs().max() > 1e-2


def check_is_the_same(source: Path, out: Path) -> None:
    assert_same(tensors(out), tensors(source))
    first, second = (read_json(at / "config.json") for at in (source, out))
    assert first == second


def check_in_memory_is_the_checkpoint(case: Case, work: Path) -> None:
    assert_same(case.in_memory.state_dict(), case.loaded.state_dict())
    for module in case.in_memory.modules():  # adapters are made by what a module announces
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    case.in_memory.save_pretrained(work / "saved")
    again = cfsp.load(work / "saved")
    assert_same(again.state_dict(), case.in_memory.state_dict())
    assert torch.equal(logits_of(again, case.tokens_BT), logits_of(case.in_memory, case.tokens_BT))
