"""What several processes do of a repair on the pruned stream: the first decides for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.repair.repaired import RepairedBlock, facts_of, repaired_from

if TYPE_CHECKING:
    from cfsp.engine.group_at_work import GroupAtWork


def done_by_first(
    work: GroupAtWork, directory: Path, repair: Callable[[], RepairedBlock]
) -> RepairedBlock:
    """Return what the first process did with a group of blocks; all have the same weights then.

    Args:
        work: the group.
        directory: where the first process writes new tensors.
        repair: leaves the group with the better of its weights; called in the first process alone.

    Raises:
        CfspError: the first process raised it.
    """
    facts = work.team.from_first(lambda: facts_of(repair()))
    repaired = repaired_from(facts, directory, work.dense_last)
    if not work.team.is_first:
        file = repaired.file
        tensors = {} if file is None else {name: file.read(name) for name in file.specs}
        work.group.fill(work.dtype, tensors)
    return repaired
