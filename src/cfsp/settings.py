"""What a user can set, as values: text, computing, and how to prune."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from cfsp.checkpoint.loading import compute_device, compute_dtype
from cfsp.errors import UsageError
from cfsp.planning.allocation import Budget
from cfsp.planning.make import Criterion
from cfsp.repair.local_training import LocalTraining
from cfsp.text.windows import DEFAULT_SAMPLES, DEFAULT_SEQLEN, Windows, draw_windows
from cfsp.whole_model.own_text import OWN_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.checkpoint.reading import WeightSource

Restore = Literal["ridge", "sequential", "local", "bias", "none"]
RESTORE_METHODS: tuple[Restore, ...] = ("ridge", "sequential", "local", "bias", "none")
# They change weights by what they see on the calibration text.
FITTED: tuple[Restore, ...] = ("ridge", "sequential", "local")
DEFAULT_RESTORE: Restore = "ridge"

LONGEST_WINDOW = 1 << 24
DEFAULT_EVALUATION_WINDOWS = 12
MOST_WINDOWS = 1 << 32


class WriteWindows(Protocol):
    """Lets a model write windows; see `cfsp.whole_model.own_text`."""

    def __call__(self, *, count: int, seqlen: int, seed: int) -> Tensor:
        """Return `count` windows of `seqlen` tokens, as int64 [N, T]."""
        ...


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on; see `cfsp.text.windows.draw_windows`.

    The name `self` stands for text that the model writes itself.
    """

    names: tuple[str, ...] = ("python-docs",)
    samples: int | None = None
    seqlen: int = DEFAULT_SEQLEN
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed must be in [0, 2^63), found {self.seed}")
        if self.seqlen > LONGEST_WINDOW:
            raise UsageError(f"--seqlen must be at most {LONGEST_WINDOW}, found {self.seqlen}")
        if self.samples is not None and self.samples > MOST_WINDOWS:
            raise UsageError(f"--samples must be at most {MOST_WINDOWS}, found {self.samples}")

    def draw(
        self, tokenizer: PreTrainedTokenizerBase, write: WriteWindows | None = None
    ) -> Windows:
        """Draw the windows.

        Args:
            tokenizer: the model's own.
            write: gives windows that the model wrote itself, for the text `self`.

        Raises:
            TextError: a text is missing or too short.
            UsageError: the model cannot write here.
        """
        others = tuple(name for name in self.names if name != OWN_TEXT)
        if others == self.names:
            return draw_windows(
                others, tokenizer, samples=self.samples, seqlen=self.seqlen, seed=self.seed
            )
        if write is None:
            raise UsageError(
                f"--data {OWN_TEXT} is text that the model writes to be calibrated on by prune and "
                "calibrate; name another text here"
            )
        total = DEFAULT_SAMPLES if self.samples is None else self.samples
        share = total * len(others) // len(self.names)
        own_NT = write(count=total - share, seqlen=self.seqlen, seed=self.seed)
        own = Windows(own_NT, {OWN_TEXT: len(own_NT)})
        if not others:
            return own
        drawn = draw_windows(others, tokenizer, samples=share, seqlen=self.seqlen, seed=self.seed)
        return Windows(torch.cat([drawn.tokens_NT, own.tokens_NT]), drawn.sources | own.sources)


@dataclass(frozen=True)
class EvaluationText:
    """Which texts to measure perplexity on: the first windows of each.

    Attributes:
        names: of texts.
        windows: of each text; None for all.
        seqlen: tokens in a window; None for 1024, or what the model can read if that is less.
        stride: tokens from one window's start to the next one's; None for no overlap.
    """

    names: tuple[str, ...] = ()
    windows: int | None = DEFAULT_EVALUATION_WINDOWS
    seqlen: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        # Now, not after an hour of pruning.
        if self.windows is not None and self.windows < 1:
            raise UsageError(f"expected at least 1 window to measure on, found {self.windows}")
        if self.seqlen is not None and not 2 <= self.seqlen <= LONGEST_WINDOW:
            raise UsageError(
                f"expected windows of 2 to {LONGEST_WINDOW} tokens to measure on, found "
                f"{self.seqlen}"
            )


@dataclass(frozen=True)
class Engine:
    """Where and how blocks compute, resolved for one model on this machine."""

    device: torch.device
    dtype: torch.dtype
    batch_windows: int | None = None


@dataclass(frozen=True)
class Compute:
    """Where to compute and in what; `auto` is resolved for the model and machine at hand.

    Attributes:
        device: `auto` or a device that torch knows.
        dtype: `auto` or a name.
        batch_windows: windows that pass a block together; None for about 4096 tokens.
        memory_budget: bytes of hidden states above which they go to a file; None for a share
            of the available memory.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_windows: int | None = None
    memory_budget: int | None = None

    def engine(self, source: WeightSource) -> Engine:
        """Resolve `auto`."""
        return Engine(
            compute_device(self.device), compute_dtype(source, self.dtype), self.batch_windows
        )


@dataclass(frozen=True)
class PruneSettings:
    """How to prune.

    Attributes:
        budget: how much to remove; without meaning when a plan is given.
        criterion: what counts as important; likewise.
        text: what to calibrate and restore on.
        compute: where and in what.
        restore: `ridge` repairs the down projections by least squares, `sequential` fits
            them again on the pruned model's own hidden states, `local` goes on from there and
            trains a few blocks at a time, `bias` adds the mean of what was removed, `none` does
            nothing.
        local: how `local` trains.
        search_rounds: rounds of the search for better widths (see `cfsp.whole_model.width_search`); 0 for none.
            Not with repair: what is best before it is not best after it (LOG.md).
    """

    budget: Budget
    criterion: Criterion = field(default_factory=Criterion)
    text: CalibrationText = field(default_factory=CalibrationText)
    compute: Compute = field(default_factory=Compute)
    restore: Restore = DEFAULT_RESTORE
    local: LocalTraining = field(default_factory=LocalTraining)
    search_rounds: int = 0

    def __post_init__(self) -> None:
        if self.search_rounds < 0:
            raise UsageError(f"--search must be 0 or more rounds, found {self.search_rounds}")
        if self.search_rounds and self.restore in FITTED:
            raise UsageError(
                f"--search finds widths for a model that is not repaired, and with --restore "
                f"{self.restore} they measure worse; give --restore none, or no --search"
            )

    def without_restoration(self) -> PruneSettings:
        """Return the same settings, without repair."""
        return replace(self, restore="none")
