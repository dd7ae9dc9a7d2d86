"""What is pruned, how, on which text, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cfsp.checkpoint.reading import WeightSource
from cfsp.settings import Budget, Criterion, PruneSettings
from cfsp.streaming.runtime import Runtime, fits
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows


@dataclass(frozen=True)
class Job:
    """What is pruned, how, on which text, and where."""

    source: WeightSource
    settings: PruneSettings
    tokenizer: Callable[[], PreTrainedTokenizerBase]  # called only if there is text to read
    draw: Callable[[], Windows]  # called only if windows are needed, and cheap again
    runtime: Runtime
    work_dir: WorkDir  # it outlives results, which have their repaired tensors there

    @property
    def budget(self) -> Budget:
        """What may go."""
        return self.settings.budget

    @property
    def criterion(self) -> Criterion:
        """What counts as important."""
        return self.settings.criterion

    def fits(self, models: int = 1) -> bool:
        """Return whether the whole model fits into memory, or so many as large.

        Memory comes and goes: what a killed run found holds, and of several processes, which all
        have to ask, the first looks.
        """
        found = self.work_dir.once(
            f"fits-{models}", lambda: {"fits": fits(self.source, self.runtime, models)}
        )
        return bool(found["fits"])
