"""What is pruned, how, on which text, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cfsp.checkpoint.reading import WeightSource
from cfsp.settings import Budget, Criterion, PruneSettings
from cfsp.streaming.runtime import Runtime
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
