"""The Python interface: the same stages as the command line, on paths or models in memory."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.loading import torch_as_it_starts
from cfsp.checkpoint.locating import check_is_name, open_checkpoint
from cfsp.checkpoint.output import output_path
from cfsp.checkpoint.reading import Checkpoint, WeightSource, in_memory
from cfsp.decide import plan_from
from cfsp.errors import UsageError
from cfsp.pipeline import calibrate_source, prune_checkpoint, prune_model
from cfsp.planning.plan_file import PruningPlan
from cfsp.prune_and_recover import prune_and_recover
from cfsp.quality.answers import Questions
from cfsp.quality.evaluate import Exam, evaluate_models
from cfsp.result.prune_report import PruneReport
from cfsp.settings import (
    BEST_EFFORT,
    DEFAULT_PARTS,
    DEFAULT_SEQLEN,
    DEFAULT_TEXT,
    GOALS,
    OF_PRUNE,
    Bos,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    Data,
    EvaluationText,
    Goal,
    MaxLossIncrease,
    PruneSettings,
    Repair,
    asked,
    check_names,
    from_names,
    one_or_several,
    prune_settings,
    texts_of,
)
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import check_tokenizer, load_tokenizer


# What the result depends on; every other argument stands once, below.
@overload
def prune(
    model: str | Path, tokenizer: None = None, *, out: str | Path, **choices: Any
) -> PruneReport: ...


@overload
def prune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **choices: Any
) -> PreTrainedModel: ...


@torch_as_it_starts()
def prune(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    parts: str | Sequence[str] | None = None,
    goal: Goal | None = None,
    data: Data = DEFAULT_TEXT,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    eval: Data = (),
    effort: str | None = None,
    repair: Repair | None = None,
    device: str = "auto",
    **advanced: Any,
) -> PruneReport | PreTrainedModel:
    """Prune a model: a path into a new directory, or a model in memory into a smaller one.

    Args:
        model: a directory, hub id, .gguf file or `demo`; or a transformers model.
        tokenizer: needed for a model in memory, and for nothing else.
        out: the new directory; needed for a path, and for nothing else.
        sparsity: share of the part that goes, in [0, 1). Of blocks, attention layers and experts a
            number may be said instead: `parts="blocks", remove=4`.
        parts: what may go: `ffn`, `kv`, `blocks`, or with a goal several of these; `attention` or
            `experts` alone; None for `ffn`, with `TargetKVCache` for `kv`, and with
            `TargetParameters` that takes many channels for blocks too if they fit.
        goal: what to aim at instead: `TargetParameters`, `TargetKVCache`, `MaxLossIncrease` or
            `TargetSpeedup`; or its option, such as `target_params=0.7`.
        data: calibration texts: names (see `cfsp.text.sources`), or `cfsp.Text` for texts
            themselves.
        samples: windows in all; None for 128 or what there is.
        seqlen: tokens in a window.
        eval: texts to measure perplexity on, before and after; of a path only.
        effort: `fast` repairs nothing, `standard`, which None is, by least squares, `best` again
            on what the pruned blocks give, then trains a path that fits into memory whole, as
            `recover` does (the model before that stays in `OUT-pruned`).
        repair: the repair by its name instead: `none`, `ridge` or `sequential`.
        device: where to compute; `auto` is an accelerator if there is one.
        **advanced: the settings that `cfsp prune --help-all` lists, by the same names; what reads
            or writes files of its own (plan, statistics, dry-run, estimate) is the command's.

    Returns:
        A report for a path; for one in memory a new model in evaluation mode, which shares the
        unpruned tensors. The one in memory may be in training mode, and stays so.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    check_names(prune, advanced, *OF_PRUNE)
    given = advanced | _said(
        sparsity=sparsity, parts=parts, data=data, samples=samples, seqlen=seqlen, eval=eval,
        effort=effort, repair=repair, device=device,
    )  # fmt: skip
    settings = prune_settings(given, goal)
    check_texts(settings.text.names, settings.evaluation.names)  # before a model is downloaded
    trains = effort == BEST_EFFORT
    if isinstance(model, str | Path):
        if out is None or tokenizer is not None:
            raise UsageError(
                "pruning a path needs out=, the new directory, and no tokenizer: it has its own"
            )
        new = output_path(out)
        name = asked(given, goal)[0].removeprefix("--").replace("-", "_")
        how_much = f"{name}={given[name]!r}" if goal is None else f"goal={goal}"
        command = f"cfsp.prune({str(model)!r}, {how_much}, ...)"
        source = open_checkpoint(model, parts=settings.budget.parts)
        if trains:
            report, trained = prune_and_recover(source, new, settings, command=command)
            if trained is None:
                return report
            # Of what lies there: the manifest has both steps.
            perplexity = {
                text: found | _trained(found, trained.perplexity[text])
                for text, found in report.perplexity.items()
            }
            return replace(report, out=trained.out, perplexity=perplexity)
        return prune_checkpoint(source, new, settings, command=command)
    if tokenizer is None or out is not None or eval:
        raise UsageError(
            "pruning a model in memory needs its tokenizer, no out= and no eval=; "
            "it returns the new model, which save_pretrained can write"
        )
    return prune_model(model, tokenizer, settings)


def _trained(pruned: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Return what training changes of a perplexity; it may compute in another dtype."""
    dtypes = dict.fromkeys((pruned["dtype"], trained["dtype"]))
    return {"after": trained["after"], "dtype": ", then ".join(dtypes)}


def _said(**choices: Any) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if value is not None}


@torch_as_it_starts()
def calibrate(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: Data = DEFAULT_TEXT,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    device: str = "auto",
    parts: str | Sequence[str] = DEFAULT_PARTS,
    **advanced: Any,
) -> Statistics:
    """Run a text through a model once and return what plans are made from.

    Arguments are those of `prune`, `parts` those of later plans. What pruning each block alone does
    to the predictions is measured by the same rule, unless `block_metric` is another one. With
    `blocks` or `attention` it is also measured in which order these go best, up to half of them.
    """
    check_names(calibrate, advanced, CalibrationText, Criterion, Compute)
    text = from_names(CalibrationText, advanced, names=data, samples=samples, seqlen=seqlen)
    check_texts(text.names)
    budget = from_names(Budget, {}, parts=parts)
    compute = from_names(Compute, advanced, device=device)
    settings = PruneSettings(budget, from_names(Criterion, advanced), text, compute)
    if tokenizer is not None:
        if isinstance(model, str | Path):
            raise UsageError("calibrating a path needs no tokenizer: it has its own")
        check_tokenizer(tokenizer)
    source = _opened(model, budget)
    if tokenizer is None:
        if not isinstance(source, Checkpoint):
            raise UsageError("calibrating a model in memory needs its tokenizer")
        tokenizer = load_tokenizer(source.directory)
    return calibrate_source(source, tokenizer, settings)


@torch_as_it_starts()
def plan(
    model: str | Path | PreTrainedModel,
    statistics: Statistics,
    *,
    sparsity: float | None = None,
    parts: str | Sequence[str] | None = None,
    goal: Goal | None = None,
    **advanced: Any,
) -> PruningPlan:
    """Decide from statistics which channels stay.

    Arguments are those of `prune` that read no text: goals but for a bound on the loss. So blocks
    are not tried beside channels.
    """
    if isinstance(goal, MaxLossIncrease):
        raise UsageError("a bound on the loss needs a text; give the goal to cfsp.prune")
    if not isinstance(statistics, Statistics):
        raise UsageError(
            "expected statistics, such as cfsp.calibrate or cfsp.Statistics.load gives, found "
            f"{reprlib.repr(statistics)}"
        )
    known = (each for each in GOALS if each is not MaxLossIncrease)
    check_names(plan, advanced, Budget, *known, Criterion, Compute)
    settings = prune_settings(advanced | _said(sparsity=sparsity, parts=parts), goal)
    return plan_from(_opened(model, settings.budget), statistics, settings)


@torch_as_it_starts()
def evaluate(
    models: str | Path | Sequence[str | Path],
    data: Data = (),
    *,
    windows: int | str | None = EvaluationText.windows,
    seqlen: int | None = EvaluationText.seqlen,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str = "auto",
    against: str | Path | None = None,
    answers: int | str | None = None,
) -> list[dict[str, Any]]:
    """Return perplexities of models on texts, and answers, as `cfsp eval --json` prints them.

    Tasks are of the command alone.

    Args:
        models: one or several directories, hub ids, .gguf files or `demo`.
        data: texts, as for `prune`.
        windows: consecutive windows from the beginning of each text; None or `all` for all.
        seqlen: tokens in a window, BOS included; None for 1024, or what all models can read if
            that is less.
        bos: whether windows begin with BOS: `yes`, `no`, or `auto`, as the tokenizer begins an
            input.
        device: where to compute.
        dtype: what to compute in.
        against: the dense model, which is measured too, and how far the others are from its
            predictions.
        answers: ask so many of the questions that come with cfsp, or those that begin the chats of
            a .jsonl file; needs `against`.
    """
    compute = from_names(Compute, {}, device=device, dtype=dtype)
    count: Any = None if windows == "all" else windows  # which refuses other words
    texts = EvaluationText(texts_of(data), count, seqlen, bos=bos)
    if not texts.names and answers is None:
        raise UsageError(
            "there is no text to measure on; give one or several, such as wikitext2 or a .txt file"
        )
    questions = None if answers is None else Questions.of(answers)
    names = one_or_several(models)
    if not names:
        raise UsageError("there is no model to measure; give one or several")
    if against is not None:
        check_is_name(against)
    exam = Exam(texts, compute, questions=questions)
    return evaluate_models(names, exam, against=against)


def _opened(model: str | Path | PreTrainedModel, budget: Budget) -> WeightSource:
    if isinstance(model, str | Path):
        return open_checkpoint(model, parts=budget.parts)
    return in_memory(model, budget.parts)
