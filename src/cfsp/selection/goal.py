"""From what was asked for to a constraint, and to the parts that may go for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import parameter_count
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.job import Job
from cfsp.planning.candidate import Dropped
from cfsp.planning.make import parameters_of_channels
from cfsp.selection.constraint import Constraint, DropBudget, Parameters, Share
from cfsp.selection.drop_order import check_can_go
from cfsp.selection.kv_cache import CacheFraction
from cfsp.selection.loss import LossIncrease, held_out_windows
from cfsp.selection.search import has_room_for_two
from cfsp.selection.speedup import Speedup
from cfsp.settings import (
    DEFAULT_PARTS,
    Part,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.streaming.work_dir import load_or_compute

# From about this share of the FFN channels on, whole blocks beside fewer channels were better on
# one of two models: not at 29% or 33%, but at 43% (docs/STUDIES.md, study 9).
MANY_CHANNELS = 0.4

log = logging.getLogger(__name__)


def constraint_of(job: Job) -> tuple[Job, Constraint]:
    """Return what candidates have to meet, and the job with the parts that may go for it.

    It is checked before a forward pass. Windows are drawn only where that says which parts may go;
    models are timed for a speed.
    """
    source, budget, goal = job.source, job.budget, job.settings.goal
    constraint: Constraint
    if goal is None:
        constraint = Share(source, budget)
    elif isinstance(goal, TargetParameters):
        asked = Parameters(source, budget, goal.fraction)
        budget = replace(budget, parts=_parts_for(job, asked))
        job = replace(job, settings=replace(job.settings, budget=budget))
        constraint = replace(asked, budget=budget)
    elif isinstance(goal, TargetKVCache):
        constraint = CacheFraction(source, budget, goal.fraction)
    elif isinstance(goal, TargetSpeedup):
        constraint = Speedup(source, budget, goal, job.runtime, job.work_dir)
    else:
        # Too little text should be found out before the calibration.
        held_out = held_out_windows(job.settings.text, job.tokenizer())
        constraint = LossIncrease(source, budget, goal, held_out, job.runtime, job.work_dir)
    constraint.check()
    return job, constraint


def _parts_for(job: Job, asked: Parameters) -> tuple[Part, ...]:
    """Return what may go; where nobody said it and many FFN channels would go, blocks too.

    How many blocks go is then tried after repair, with the model and a pruned one in memory. Where
    that is impossible, FFN channels go alone. People are told.
    """
    if not job.settings.leaves_parts_open:
        return job.budget.parts
    gone = asked.share_of_all * parameter_count(job.source)
    share = gone / parameters_of_channels(job.source, DEFAULT_PARTS)
    if share < MANY_CHANNELS:
        return DEFAULT_PARTS
    if share < 1:
        would = f"{share:.0%} of the FFN channels would go alone"
    else:
        would = "all FFN channels would not be enough"
        _of_blocks(asked)  # nor may blocks be
    job.draw()  # in every process: they compare what they drew

    def choose() -> dict[str, Any]:
        if obstacle := _obstacle(job, asked):
            log.info("%s, and %s: whole blocks are not tried beside them", would, obstacle)
            return {"parts": DEFAULT_PARTS}
        log.info("%s: whole blocks are tried beside them; --parts ffn does without", would)
        return {"parts": (*DEFAULT_PARTS, "blocks")}

    # A run that is resumed may find another amount of memory.
    found = job.work_dir.team.from_first(lambda: load_or_compute(job.work_dir, "parts", choose))
    return tuple(found["parts"])


def _obstacle(job: Job, asked: Parameters) -> str:
    """Return why it cannot be tried how many blocks go; nothing if it can."""
    if not has_room_for_two(job.source, job.runtime):
        return "there is no memory for a pruned model beside the dense one"
    if job.draw().has_images:
        return "the text has images"
    try:
        wanted = _of_blocks(asked)
        *others, last = sorted(wanted.sizes.block_of)
        # As many as would go alone, but for the first; none of a model with one block.
        if not (gone := wanted.first([Removal(block, 0.0) for block in (*others[1:], last)])):
            raise UnsupportedModelError
        for some in (Dropped((last,)), Dropped.of(gone)):
            check_can_go(job.source, some)
    except (BudgetError, UnsupportedModelError):
        return "the model cannot do without enough of them"
    return ""


def _of_blocks(asked: Parameters) -> DropBudget:
    share, keep = asked.share_of_all, asked.budget.keep
    return DropBudget.of_share(asked.source, ("blocks",), share, of_model=True, keep=keep)
