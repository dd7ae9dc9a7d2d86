"""The contract: a tiny model of a type goes through the pipeline, and its checkpoint works.

    pruned     the pipeline prunes a checkpoint of it
    bites      the original with the removed channels masked computes something else

What stock software makes of the pruned checkpoint are the checks of `cfsp.families.stock`, in a
process without cfsp.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import auto_classes_of
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import architecture_of, blocks_of
from cfsp.engine.resumed_forward import skipped
from cfsp.errors import UnsupportedModelError
from cfsp.families.catalogue import Family
from cfsp.families.stock import Question, computed, first_line
from cfsp.families.tiny import random_model, tiny_config
from cfsp.pipeline import prune_checkpoint
from cfsp.result.prune_report import PruneReport
from cfsp.settings import (
    DEFAULT_PARTS,
    Budget,
    CalibrationText,
    Compute,
    PruneSettings,
    Text,
)
from cfsp.whole_model.load import call_form_of
from cfsp.whole_model.masks import masked_unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.planning.plan_file import PruningPlan

SPARSITY = 0.4
SAMPLES, SEQLEN = 6, 32
# torch multiplies groups of experts by eights.
MULTIPLE_OF_EXPERTS = 8
# Ids that no type of a tiny model has a meaning for.
FIRST_TOKEN, LAST_TOKEN = 2, 290
WINDOWS, TOKENS = 2, 24
# A mask that changes the logits less than this proves nothing.
LEAST_EFFECT = 1e-2
MOST_PARAMETERS = 5_000_000

Result = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Contract:
    """What came of the contract.

    Attributes:
        result: `not run` where no tiny model runs.
        notes: check -> why it failed; also where the dense model fails it too, which is not held
            against the type. `tiny model` -> why there is none that runs.
    """

    result: Result
    notes: dict[str, str] = field(default_factory=dict)


def save_with_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a model and its tokenizer as a checkpoint."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prune_tiny(source: Path, out: Path, texts: Sequence[str | Text], multiple: int) -> PruneReport:
    """Prune the checkpoint of a tiny model, without repair, which changes weights.

    Args:
        source: the checkpoint.
        out: the new one.
        texts: to calibrate on, with token ids below those with a meaning of their own.
        multiple: that FFN widths are multiples of.

    Raises:
        CfspError: it cannot be pruned.
    """
    settings = PruneSettings(
        budget=Budget(SPARSITY, multiple=multiple),
        text=CalibrationText(tuple(texts), samples=SAMPLES, seqlen=SEQLEN),
        compute=Compute("cpu"),
        repair="none",
    )
    return prune_checkpoint(Checkpoint(source), out, settings)


def least_multiple(architecture: Architecture) -> int:
    """Return what the widths of a tiny model can be multiples of."""
    return MULTIPLE_OF_EXPERTS if architecture.has_experts else 1


def question_of(
    dense: PreTrainedModel, checkpoint: Path, plan: PruningPlan | None = None
) -> Question:
    """Return what to ask stock software.

    Args:
        dense: the model; stays as it is.
        checkpoint: of it, or the pruned one.
        plan: how that one was pruned.
    """
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


def begin_contract(family: Family, place: Path) -> Contract | None:
    """Prune a tiny model of a family; write what to ask of both checkpoints.

    Args:
        family: that is proved.
        place: an empty directory. It then has what to ask of the dense checkpoint and of the
            pruned one (`dense.pt`, `pruned.pt`), as far as it came.

    Returns:
        The result if that is already the end, else None.
    """
    source, out = place / "dense", place / "pruned"
    try:
        dense = tiny_model_of(family)
    except Exception as error:  # these sizes may not suit a type
        return no_tiny_model(first_line(error))
    save_with_tokenizer(dense, tiny_tokenizer(), source)
    of_dense = question_of(dense, source)
    if "logits" in of_dense.failed:
        return no_tiny_model(of_dense.failed["logits"])
    of_dense.save(place / "dense.pt")
    multiple = least_multiple(architecture_of(dense.config))
    try:
        report = prune_tiny(source, out, [tiny_text()], multiple)
    except Exception as error:  # a bug of ours as well
        return Contract("failed", {"pruned": first_line(error)})
    of_pruned = question_of(dense, out, report.plan)
    of_pruned.save(place / "pruned.pt")
    effect = float((of_pruned.expected["logits"] - of_dense.expected["logits"]).abs().max())
    if not effect > LEAST_EFFECT:
        reason = f"expected other logits with channels masked, found a difference of {effect:.1e}"
        return Contract("failed", {"bites": reason})
    return None


def judged(notes: Mapping[str, str], of_dense: Callable[[], Mapping[str, str]]) -> Contract:
    """Return what the contract comes to.

    Args:
        notes: check -> why the pruned checkpoint failed it.
        of_dense: gives the same of the dense checkpoint; what stock software cannot do with that
            either has nothing to do with pruning.
    """
    if not notes:
        return Contract("passed")
    also = of_dense()
    unreadable = also.get("loads") or also.get("logits")
    if unreadable:
        return no_tiny_model(f"transformers does not read back what it saved ({unreadable})")
    excused = {
        check: f"the dense model fails as well: {also[check]}" for check in notes if check in also
    }
    result: Result = "passed" if excused.keys() == notes.keys() else "failed"
    return Contract(result, {**notes, **excused})


def no_tiny_model(reason: str) -> Contract:
    """Return that the contract was not run."""
    return Contract("not run", {"tiny model": reason})


def tiny_model_of(family: Family) -> PreTrainedModel:
    """Return a tiny model of a family.

    Raises:
        Exception: none can be built, or it is not tiny, or its FFNs are not proved.
    """
    model_class, config = family.class_and_config(tiny_config)
    with torch.device("meta"):
        size = model_class._from_config(copy.deepcopy(config)).num_parameters()
    if size > MOST_PARAMETERS:
        raise UnsupportedModelError(f"the smallest one has {size} parameters")
    architecture_of(config)
    return random_model(model_class, config)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of bytes, made of nothing but their names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )
    return tokenizer


def tiny_text() -> Text:
    """Return letters and spaces enough for all windows, the same ones every time."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz     ", k=4 * SAMPLES * SEQLEN)
    return Text("letters", "".join(letters))
