"""The Python interface: the same stages as the command line, on paths or models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.errors import UsageError
from cfsp.goals.goal import Goal
from cfsp.pipeline import calibrate_source, check_all_texts, prune_checkpoint, prune_model
from cfsp.planning.allocation import Budget, BudgetOf, Clamp
from cfsp.planning.make import DEFAULT_BLOCK_METRIC, DEFAULT_CHANNEL_METRIC, Criterion
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.evaluate import evaluate_models
from cfsp.repair.local_training import (
    DEFAULT_BLOCKS,
    DEFAULT_STEPS,
    DEFAULT_TEXT,
    LocalTraining,
)
from cfsp.repair.stages import plan_from_statistics
from cfsp.result.prune_report import PruneReport
from cfsp.settings import (
    DEFAULT_RESTORE,
    CalibrationText,
    Compute,
    EvaluationText,
    PruneSettings,
    Restore,
)
from cfsp.text.sources import Text
from cfsp.text.tokenizers import Bos, load_tokenizer
from cfsp.text.windows import DEFAULT_SEQLEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# One text or several: names, or texts themselves.
Data = str | Path | Text | Sequence[str | Path | Text]
DEFAULT_DATA = ("python-docs",)


@overload
def prune(
    model: str | Path,
    tokenizer: None = None,
    *,
    out: str | Path,
    sparsity: float | None = ...,
    goal: Goal | None = ...,
    of: BudgetOf = ...,
    multiple: int | None = ...,
    data: Data = ...,
    samples: int | None = ...,
    seqlen: int = ...,
    seed: int = ...,
    bos: Bos = ...,
    block_metric: str = ...,
    channel_metric: str = ...,
    clamp: Clamp | None = ...,
    search_rounds: int = ...,
    restore: Restore = ...,
    local_steps: int = ...,
    local_blocks: int = ...,
    local_text: float = ...,
    device: str = ...,
    dtype: str = ...,
) -> PruneReport: ...


@overload
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    out: None = None,
    sparsity: float | None = ...,
    goal: Goal | None = ...,
    of: BudgetOf = ...,
    multiple: int | None = ...,
    data: Data = ...,
    samples: int | None = ...,
    seqlen: int = ...,
    seed: int = ...,
    bos: Bos = ...,
    block_metric: str = ...,
    channel_metric: str = ...,
    clamp: Clamp | None = ...,
    search_rounds: int = ...,
    restore: Restore = ...,
    local_steps: int = ...,
    local_blocks: int = ...,
    local_text: float = ...,
    device: str = ...,
    dtype: str = ...,
) -> PreTrainedModel: ...


def prune(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    goal: Goal | None = None,
    of: BudgetOf = "ffn",
    multiple: int | None = None,
    data: Data = DEFAULT_DATA,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
    bos: Bos = "auto",
    block_metric: str = DEFAULT_BLOCK_METRIC,
    channel_metric: str = DEFAULT_CHANNEL_METRIC,
    clamp: Clamp | None = None,
    search_rounds: int = 0,
    restore: Restore = DEFAULT_RESTORE,
    local_steps: int = DEFAULT_STEPS,
    local_blocks: int = DEFAULT_BLOCKS,
    local_text: float = DEFAULT_TEXT,
    device: str = "auto",
    dtype: str = "auto",
) -> PruneReport | PreTrainedModel:
    """Prune a model: a path into a new directory, or a model in memory into a smaller one.

    Args:
        model: a directory, hub id, .gguf file or `demo`; or a transformers model.
        tokenizer: needed for a model in memory, and for nothing else.
        out: the new directory; needed for a path, and for nothing else.
        sparsity: fraction to remove, in [0, 1).
        goal: what to aim at instead: `TargetParameters`, `MaxLossIncrease` or `TargetSpeedup`.
        of: of the sparsity: `ffn` (FFN channels) or `model` (all parameters).
        multiple: widths become multiples of this; None for 128 or, below 4096 channels, 32.
        data: calibration texts: names (see `cfsp.text.sources`), or `cfsp.Text` for texts
            themselves.
        samples: windows in all; None for 128 or what there is.
        seqlen: tokens in a window, BOS included.
        seed: of the draw of windows.
        bos: whether windows begin with BOS: `yes`, `no`, or `auto`, as the tokenizer begins an
            input.
        block_metric: coarse criterion.
        channel_metric: fine criterion.
        clamp: what happens where a block would keep more than all (see `cfsp.planning.allocation`); None
            for what measures best with the block metric.
        search_rounds: rounds of the search for better widths (see `cfsp.whole_model.width_search`).
        restore: `ridge` repairs the down projections by least squares; `sequential` then
            fits them again on the pruned model's own hidden states; `local` goes on from there and
            trains a few blocks at a time; `bias` compensates for the mean of what is removed;
            `none` does not.
        local_steps: of `local`, for each group of blocks.
        local_blocks: of `local`, how many consecutive blocks train together.
        local_text: of `local`, the part of the text in the loss of the last blocks.
        device: where to compute; `auto` is an accelerator if there is one.
        dtype: what to compute in; `auto` is the model's own.

    Returns:
        A report for a path; a new model, sharing the unpruned tensors, for one in memory.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    if (sparsity is None) == (goal is None):
        raise UsageError(
            "expected a sparsity or a goal that says how much to remove, found "
            + ("neither" if goal is None else "both")
        )
    settings = PruneSettings(
        budget=Budget(sparsity or 0.0, of, multiple),
        criterion=Criterion(block_metric, channel_metric, clamp),
        text=CalibrationText(_texts(data), samples, seqlen, seed, bos),
        compute=Compute(device, dtype),
        restore=restore,
        local=LocalTraining(local_steps, local_blocks, local_text),
        search_rounds=search_rounds,
    )
    if isinstance(model, str | Path):
        if out is None:
            raise UsageError("pruning a path needs out=, the new directory")
        # Before a model is downloaded or converted.
        check_all_texts(settings.text, goal=goal)
        asked = f"goal={goal}" if goal else f"sparsity={sparsity}, of={of!r}"
        command = f"cfsp.prune({str(model)!r}, {asked}, ...)"
        return prune_checkpoint(
            open_checkpoint(model), Path(out), settings, goal=goal, command=command
        )
    if tokenizer is None or out is not None:
        raise UsageError(
            "pruning a model in memory needs its tokenizer and no out=; "
            "it returns the new model, which save_pretrained can write"
        )
    return prune_model(model, tokenizer, settings, goal)


def calibrate(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: Data = DEFAULT_DATA,
    samples: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str = "auto",
    sensitivity: bool = False,
) -> Statistics:
    """Run a text through a model once and return what plans are made from.

    Arguments are those of `prune`; `sensitivity` also measures what pruning each block alone does
    to the predictions, which takes the whole model in memory.
    """
    text = CalibrationText(_texts(data), samples, seqlen, seed, bos)
    text.check()
    source = _source(model)
    if tokenizer is None:
        if not isinstance(source, Checkpoint):
            raise UsageError("calibrating a model in memory needs its tokenizer")
        tokenizer = load_tokenizer(source.directory)
    compute = Compute(device, dtype)
    return calibrate_source(source, tokenizer, text, compute, sensitivity=sensitivity)


def plan(
    model: str | Path | PreTrainedModel,
    statistics: Statistics,
    *,
    sparsity: float,
    of: BudgetOf = "ffn",
    multiple: int | None = None,
    block_metric: str = DEFAULT_BLOCK_METRIC,
    channel_metric: str = DEFAULT_CHANNEL_METRIC,
    clamp: Clamp | None = None,
) -> PruningPlan:
    """Decide from statistics which channels stay; no forward pass.

    Arguments are those of `prune`.
    """
    criterion = Criterion(block_metric, channel_metric, clamp)
    budget = Budget(sparsity, of, multiple)
    return plan_from_statistics(_source(model), statistics, budget, criterion)


def evaluate(
    models: Sequence[str | Path],
    data: Data,
    *,
    windows: int | None = None,
    seqlen: int = DEFAULT_SEQLEN,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """Return perplexities of models on texts, as `cfsp eval --json` prints them.

    Args:
        models: directories, hub ids, .gguf files or `demo`.
        data: texts, as for `prune`.
        windows: consecutive windows from the beginning of each text; None for all.
        seqlen: tokens in a window, BOS included.
        bos: as for `prune`.
        device: where to compute.
        dtype: what to compute in.
    """
    texts = EvaluationText(_texts(data), windows, seqlen, bos=bos)
    if not texts.names:
        raise UsageError(
            "there is no text to measure on; give one or several, such as wikitext2 or a .txt file"
        )
    return evaluate_models([str(model) for model in models], texts, Compute(device, dtype))


def _texts(data: Data) -> tuple[str | Text, ...]:
    given = (data,) if isinstance(data, str | Path | Text) else data
    return tuple(text if isinstance(text, Text) else str(text) for text in given)


def _source(model: str | Path | PreTrainedModel) -> WeightSource:
    return open_checkpoint(model) if isinstance(model, str | Path) else LoadedModel(model)
