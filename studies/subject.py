"""A model in memory: calibrated once, pruned by many plans, measured on texts, no files between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import locate_model
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.engine.compute import engine_of
from cfsp.engine.workplace import temporary_workplace
from cfsp.pipeline import calibrate_source
from cfsp.planning.channels import choose_channels
from cfsp.planning.make import make_plan
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.perplexity import perplexity
from cfsp.repair.ladder import plan_and_repair
from cfsp.settings import Budget, CalibrationText, Compute, Criterion, PruneSettings
from cfsp.text.drawing import consecutive_windows, draw_text
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from cfsp.whole_model.masks import masked_channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The widths of all published rows, for SmolLM2-135M; the default of `cfsp prune` has changed since.
MULTIPLE = 32


@dataclass(frozen=True)
class Subject:
    """A model and the texts that it is judged by.

    Attributes:
        model: the dense model.
        source: the same as a source of weights.
        tokenizer: its own.
        texts: label of each text -> its windows.
    """

    model: PreTrainedModel
    source: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Windows]

    def calibrate(self, text: CalibrationText) -> Statistics:
        """Run the calibration text through the model once."""
        return calibrate_source(self.source, self.tokenizer, text, Compute())

    def on_first(self, windows: int) -> Subject:
        """Return the same model judged by only the first windows of each text."""
        few = {
            text: replace(found, tokens_NT=found.tokens_NT[:windows])
            for text, found in self.texts.items()
        }
        return replace(self, texts=few)

    def pruned(self, plan: PruningPlan) -> PreTrainedModel:
        """Return the model that a plan describes, without repair."""
        return build_pruned_model(self.model, self.source, plan, {}, {})

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the perplexity on each text."""
        return {
            label: round(perplexity(model, windows).value, 4)
            for label, windows in self.texts.items()
        }

    def quality_of(self, plan: PruningPlan) -> dict[str, float]:
        """Return the perplexity on each text of the model that a plan describes."""
        return self.quality(self.pruned(plan))

    def plan(
        self,
        statistics: Statistics,
        sparsity: float,
        criterion: Criterion | None = None,
        multiple: int = MULTIPLE,
    ) -> PruningPlan:
        """Return the plan that `cfsp plan --set multiple=...` would make."""
        budget = Budget(sparsity, multiple=multiple)
        return make_plan(self.source, statistics, budget, criterion or Criterion())

    def quality_of_some(
        self, statistics: Statistics, sparsity: float, blocks: Sequence[int]
    ) -> dict[str, float]:
        """Return the perplexity on each text when only some blocks lose channels.

        Args:
            statistics: of the calibration.
            sparsity: fraction of the channels of these blocks that goes, the weakest.
            blocks: their indices.
        """
        kept = {}
        for block in blocks:
            observed = statistics.units[block]
            width = max(1, round(observed.width * (1 - sparsity)))
            kept[block] = choose_channels(self.source, block, observed, width, Criterion())
        return self.quality_masked(kept)

    def quality_masked(self, kept: Mapping[int, Sequence[int]]) -> dict[str, float]:
        """Return the perplexity on each text when blocks have some of their channels only.

        Args:
            kept: block -> channels that stay; a block that is not named keeps all.
        """
        with masked_channels(self.source, self.model, kept):
            return self.quality(self.model)

    def quality_repaired(self, text: CalibrationText, plan: PruningPlan) -> dict[str, float]:
        """Return the perplexity on each text after ridge repair of what a plan leaves."""
        settings = PruneSettings(Budget(0.0), text=text, repair="ridge")
        with temporary_workplace() as place:
            repaired = plan_and_repair(
                self.source,
                lambda: draw_text(text, self.tokenizer),
                settings,
                engine_of(settings.compute, self.source),
                place=place,
                plan=plan,
            )
            pruned = build_pruned_model(self.model, self.source, plan, repaired.tensors, {})
            return self.quality(pruned)


def load_subject(name: str | Path, texts: Sequence[str], windows: int, seqlen: int) -> Subject:
    """Load a model and the first windows of the texts that it is judged by.

    Args:
        name: of the model, as for `cfsp prune`.
        texts: as for `--eval`.
        windows: of each text.
        seqlen: tokens of a window.
    """
    directory = locate_model(name)
    model, tokenizer = load(directory), load_tokenizer(directory)
    found = {
        label(text): consecutive_windows(text, tokenizer, count=windows, seqlen=seqlen)
        for text in texts
    }
    return Subject(model, LoadedModel(model), tokenizer, found)


def label(text: str) -> str:
    """Return a text's name without what is this machine's: the last two parts of a path."""
    path = Path(text)
    if not path.exists():
        return text
    return "/".join([*path.parts[-2:-1], path.stem])
