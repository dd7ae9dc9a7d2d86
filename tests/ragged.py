"""Tiny checkpoints whose blocks differ in width, cut by a plan made by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.shards import write_shards
from cfsp.checkpoint.writing import copy_travelling_files, write_config
from cfsp.cut.surgery import PrunedSource
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan

WIDTHS = (64, 32, 96)


def cut(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    widths: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> Checkpoint:
    """Return a checkpoint of the model with these widths, made in an existing directory.

    Args:
        model: of three blocks.
        tokenizer: its own.
        directory: for the dense and the pruned model.
        widths: of every FFN unit; None for `WIDTHS` of units of 96 channels, and for others in
            the same proportion.
        groups: KV groups of every attention, 0 where it goes; None if attentions stay.
    """
    dense, pruned = directory / "dense", directory / "pruned"
    pruned.mkdir()
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    source = Checkpoint(dense, parts=("ffn",) if groups is None else ("ffn", "kv", "attention"))
    if widths is None:
        ffns = source.architecture.of_part("ffn").units
        widths = [WIDTHS[u.block] * u.width // max(WIDTHS) // 8 * 8 for u in ffns]
    if groups is not None:  # in a block the attention comes first
        widths = [width for pair in zip(groups, widths, strict=True) for width in pair]
    blocks = tuple(
        UnitPlan(
            unit.block,
            unit.width,
            _chosen(unit.width, kept, unit.ffns, random.Random(i)),
            0.1,
            0.5,
            unit.ffns,
            path=unit.path,
            part=unit.part,
        )
        for i, (unit, kept) in enumerate(zip(source.units, widths, strict=True))
    )
    plan = PruningPlan(ModelIdentity.of(source), {}, {}, blocks)
    write_shards(pruned, list(PrunedSource(source, plan).outgoing()))
    write_config(source, pruned, widths)
    copy_travelling_files(dense, pruned)
    return Checkpoint(pruned)


def _chosen(width: int, kept: int, ffns: int, chance: random.Random) -> tuple[int, ...]:
    """Return channels at random, as many in each expert."""
    return tuple(
        ffn * width + channel
        for ffn in range(ffns)
        for channel in sorted(chance.sample(range(width), kept))
    )


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model with some settings of its config changed."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_models import TINY_CONFIGS

    config = TINY_CONFIGS[name]()
    fields = {**config.to_dict(), **changes}
    if "rope_parameters" in changes and "full_attention" not in changes["rope_parameters"]:
        fields["rope_parameters"] = {"rope_theta": 10000.0, **changes["rope_parameters"]}
    fields.pop("layer_types", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(type(config)(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def half_of(source: Checkpoint, out: Path) -> Checkpoint:
    """Return half of a model by the quickest pruning there is: two windows, one pass, no repair."""
    from cfsp.pipeline import prune_checkpoint
    from cfsp.settings import Budget, CalibrationText, Criterion, PruneSettings

    text = CalibrationText(("python-docs",), samples=2, seqlen=128)
    criterion = Criterion(block_metric="angular")
    prune_checkpoint(source, out, PruneSettings(Budget(0.5), criterion, text, repair="none"))
    return Checkpoint(out)
