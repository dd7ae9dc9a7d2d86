"""From a model and a text to a complete decision: which channels stay, and repaired weights.

Without restoration: calibrate, then plan. With it, either the plan is there already and a
restoring pass obeys it, or widths come from a coarse pass over a few windows and everything
else from one fine pass.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from cfsp.calibration.calibrate import calibration_record
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.skeleton import check_complete
from cfsp.checkpoint.tensor_file import TensorFile
from cfsp.cut.surgery import PrunedSource
from cfsp.planning.allocation import channels_to_keep
from cfsp.planning.make import (
    assemble_plan,
    check_statistics_fit,
    choose_channels,
    model_size,
    plan_widths,
    warn_of_few_tokens,
)
from cfsp.planning.plan_file import PruningPlan
from cfsp.repair.bias import check_can_compensate, compensate
from cfsp.repair.fused import ChooseChannels, RestoredBlock, restore_blocks
from cfsp.repair.local import check_can_reconstruct, reconstruct_blocks
from cfsp.repair.reconstructed import ReconstructedBlocks
from cfsp.repair.sequential import fit_again
from cfsp.repair.stages import (
    calibrate_windows,
    plan_from_statistics,
    with_sensitivity,
)
from cfsp.text.windows import few_windows
from cfsp.whole_model.load import searched

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.workplace import Workplace
    from cfsp.result.manifest import Stopwatch
    from cfsp.settings import Engine, PruneSettings
    from cfsp.text.windows import Windows

# Angular distance settles with little text; benchmarks/coarse_windows.py shows how little.
COARSE_WINDOWS = 8


@dataclass(frozen=True)
class Decision:
    """All that surgery needs.

    Attributes:
        plan: which channels stay.
        statistics: of the calibration; None where a plan was given.
        restored: one entry for each block; empty without restoration.
        refitted: likewise (see `fit_again`); empty without sequential repair.
        reconstructed: likewise (see `reconstruct_blocks`); empty without local reconstruction.
        biases: of the down projections, where they compensate for what was removed.
    """

    plan: PruningPlan
    statistics: Statistics | None = None
    restored: Sequence[RestoredBlock] = ()
    refitted: Sequence[ReconstructedBlocks | None] = ()
    reconstructed: Sequence[ReconstructedBlocks | None] = ()
    biases: TensorFile | None = None

    @property
    def repaired_tensors(self) -> Mapping[str, TensorFile]:
        """Repaired and added tensors by name; blocks that are better left alone are not in it."""
        files = [block.file for block in self.restored if block.ridge is not None]
        # Each went on from what the one before had repaired.
        later = (*self.refitted, *self.reconstructed)
        files += [b.file for b in later if b is not None and b.file is not None]
        files += [self.biases] if self.biases is not None else []
        return {name: file for file in files for name in file.specs}


def decide(
    source: WeightSource,
    draw: Callable[[], Windows],
    settings: PruneSettings,
    *,
    place: Workplace,
    watch: Stopwatch,
    statistics: Statistics | None = None,
    plan: PruningPlan | None = None,
) -> Decision:
    """Decide which channels stay, and repair what is left if the settings ask for it.

    Args:
        source: the model.
        draw: gives the calibration windows; called only if they are needed.
        settings: how to prune.
        place: where to work; must outlive the decision, which has its repaired tensors there.
        watch: is told the time of each stage.
        statistics: of an earlier calibration of this model.
        plan: an earlier decision for this model.

    Raises:
        CfspError: as calibration, planning and restoration do.
    """
    engine, draw = settings.compute.engine(source), cache(draw)
    if settings.restore in ("sequential", "local"):
        check_can_reconstruct(source)
    if settings.restore == "bias":
        check_can_compensate(source)
    check_complete(source)
    if plan is not None:
        plan.check_fits(source)
    elif statistics is None:
        # An impossible budget should be refused before it has cost a forward pass.
        channels_to_keep(settings.budget, model_size(source))
    else:
        with watch.stage("plan"):
            plan = _plan(source, statistics, draw, settings, engine)
    if settings.restore in ("none", "bias"):
        return _without_gram(source, draw, settings, place, watch, statistics, plan)
    windows = draw()
    if plan is None:
        with watch.stage("calibrate and restore"):
            decision = decide_and_restore(source, windows, settings, engine, place)
    else:
        with watch.stage("restore"):
            decision = Decision(
                plan, statistics, _restore_plan(source, plan, windows, engine, place)
            )
    if settings.restore == "ridge":
        return decision
    with watch.stage("sequential"):
        decision = _fit_again(source, decision, windows, engine, place)
    if settings.restore == "sequential":
        return decision
    with watch.stage("reconstruct"):
        return _reconstruct(source, decision, windows, settings, place)


def _without_gram(
    source: WeightSource,
    draw: Callable[[], Windows],
    settings: PruneSettings,
    place: Workplace,
    watch: Stopwatch,
    statistics: Statistics | None,
    plan: PruningPlan | None,
) -> Decision:
    """Decide where nothing is repaired, or means at most: statistics say it all."""
    engine = settings.compute.engine(source)
    if statistics is None and (plan is None or settings.restore == "bias"):
        with watch.stage("calibrate"):
            statistics = calibrate_windows(source, draw(), engine, settings.text.seed, place)
        if plan is None:
            statistics = with_sensitivity(source, statistics, draw(), settings.criterion, engine)
    if plan is None:
        assert statistics is not None
        with watch.stage("plan"):
            plan = _plan(source, statistics, draw, settings, engine)
    if settings.restore == "none":
        return Decision(plan, statistics)
    assert statistics is not None
    with watch.stage("compensate"):
        path = place.directory_of("compensate") / "biases.safetensors"
        return Decision(plan, statistics, biases=compensate(source, plan, statistics, path))


def decide_and_restore(
    source: WeightSource,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
) -> Decision:
    """Fix the widths from a few windows, then choose and repair in one pass over all."""
    budget, criterion, seed = settings.budget, settings.criterion, settings.text.seed
    few = few_windows(windows, COARSE_WINDOWS)
    coarse = calibrate_windows(source, few, engine, seed, place, "coarse pass")
    coarse = with_sensitivity(source, coarse, windows, criterion, engine)
    widths = plan_widths(source, coarse, budget, criterion)
    restored = _restore(
        source,
        windows,
        engine,
        place,
        lambda block, observed: choose_channels(
            source, block, observed, widths.kept_L[block], criterion
        ),
    )
    record = calibration_record(
        source, windows, device=engine.device, dtype=engine.dtype, seed=seed
    )
    kept = [block.kept for block in restored]
    blocks = tuple(block.statistics for block in restored)
    statistics = Statistics(blocks, record, coarse.sensitivity)
    plan = assemble_plan(source, statistics, budget, criterion, widths, kept)
    warn_of_few_tokens(plan)
    return Decision(plan, statistics, restored)


def _plan(
    source: WeightSource,
    statistics: Statistics,
    draw: Callable[[], Windows],
    settings: PruneSettings,
    engine: Engine,
) -> PruningPlan:
    """Make a plan from statistics, after a search for better widths if the settings ask for one."""
    budget, criterion = settings.budget, settings.criterion
    if not settings.search_rounds:
        return plan_from_statistics(source, statistics, budget, criterion)
    check_statistics_fit(source, statistics)
    widths = plan_widths(source, statistics, budget, criterion)
    widths = searched(source, widths, statistics, draw(), settings, engine)
    return plan_from_statistics(source, statistics, budget, criterion, widths)


def _restore(
    source: WeightSource,
    windows: Windows,
    engine: Engine,
    place: Workplace,
    choose: ChooseChannels,
) -> list[RestoredBlock]:
    return restore_blocks(
        source,
        windows.tokens_NT,
        choose,
        place,
        device=engine.device,
        dtype=engine.dtype,
        batch_windows=engine.batch_windows,
    )


def _restore_plan(
    source: WeightSource, plan: PruningPlan, windows: Windows, engine: Engine, place: Workplace
) -> list[RestoredBlock]:
    print(
        "restoring a plan that was made before: this takes a forward pass of its own "
        "(--restore none does without)",
        file=sys.stderr,
    )
    kept = [block.kept for block in plan.blocks]
    return _restore(source, windows, engine, place, lambda block, _: kept[block])


def _fit_again(
    source: WeightSource, decision: Decision, windows: Windows, engine: Engine, place: Workplace
) -> Decision:
    refitted = fit_again(
        source,
        PrunedSource(source, decision.plan, decision.repaired_tensors),
        windows.tokens_NT,
        place,
        device=engine.device,
        dtype=engine.dtype,
    )
    return replace(decision, refitted=refitted)


def _reconstruct(
    source: WeightSource,
    decision: Decision,
    windows: Windows,
    settings: PruneSettings,
    place: Workplace,
) -> Decision:
    engine = settings.compute.engine(source)
    reconstructed = reconstruct_blocks(
        source,
        PrunedSource(source, decision.plan, decision.repaired_tensors),
        windows.tokens_NT,
        place,
        settings.local,
        device=engine.device,
        dtype=engine.dtype,
        seed=settings.text.seed,
    )
    return replace(decision, reconstructed=reconstructed)
