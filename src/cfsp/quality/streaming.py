"""Perplexity of a model that need not fit into memory: its windows stream through the blocks.

All windows pass block by block. What leaves the last one goes through the model's own norm and
head, some positions at a time, so that the logits of a large vocabulary take little memory. The
dense model's predictions may be there to compare with (see `cfsp.quality.agreement`).

Shapes: N windows, B windows in a batch, T tokens, P positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cfsp.calibration.calibrate import check_tokens
from cfsp.calibration.together import part_of
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.stored_blocks import parameters_within
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.processes import Team
from cfsp.quality.agreement import DenseEnd, divergence_and_agreement
from cfsp.quality.perplexity import Perplexity, negative_log_likelihood, perplexity_of
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.decoder_end import Head

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.hidden_states import HiddenStates
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.work_dir import WorkDir
    from cfsp.text.windows import Windows

# Enough positions for a fast product with the head, where the vocabulary is not huge.
LOGITS_AT_ONCE = 1 << 25

# What was added up over the predicted tokens of each window: `loss`, negative log-likelihood in
# nats; and beside a dense model `divergence`, KL(dense || model) in nats, and `agreed`, how many
# predictions have the dense model's most likely token (top-1 agreement).
WindowSums = dict[str, list[float]]


def no_sums(*, compared: bool) -> WindowSums:
    """Return the sums of no windows."""
    return {name: [] for name in (("loss", "divergence", "agreed") if compared else ("loss",))}


def joined_sums(parts: Sequence[WindowSums]) -> WindowSums:
    """Return the sums of all windows, from those of parts of them in their order."""
    return {name: list(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}


def streamed_perplexity(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    work_dir: WorkDir | None = None,
    name: str = "perplexity",
    label: str | None = None,
) -> Perplexity:
    """Measure the perplexity of a model; the arguments and errors are those of `streamed_sums`.

    The processes of the work directory share the windows.
    """
    team = Team() if work_dir is None else work_dir.team
    own = windows.part(part_of(windows, team, runtime.batch_windows))
    loss: list[float] = []
    if len(own.tokens_NT):
        sums = streamed_sums(source, own, runtime, work_dir=work_dir, name=name, label=label)
        loss = sums["loss"]
    return perplexity_of(sum(chain.from_iterable(team.gather(loss))), windows, label or name)


def streamed_sums(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    work_dir: WorkDir | None,
    name: str,
    label: str | None,
    dense: DenseEnd | None = None,
    on_end: Callable[[HiddenStates], None] = lambda hidden: None,
) -> WindowSums:
    """Add up the loss of every window, with two of the model's blocks in memory at a time.

    Logits are in the dtype that the model computes in, their log-softmax is in float32.

    Args:
        source: the model.
        windows: token windows; what pads them at the end counts for nothing.
        runtime: where and in what to compute.
        work_dir: where to spill and to save; None for neither.
        name: of the pass, in its work directory.
        label: what people read of it; None for its name.
        dense: what the dense model predicts on the same windows, to compare with.
        on_end: is given what left the last block; a pass that resumes a finished one has none.

    Raises:
        CalibrationError: token ids exceed the vocabulary.
        ResumeError: the work directory holds unfinished work of something else.
    """
    check_tokens(source.config, windows.tokens_NT, label or name)
    visitor = _AtEnd(name, label, source, windows, runtime, dense, on_end)
    found = pass_blocks(source, windows, visitor, runtime, work_dir)
    assert found[-1] is not None
    return found[-1]


class _AtEnd(Visitor[WindowSums | None]):
    """Lets windows pass; gives what is measured of them when they leave the last block."""

    def __init__(
        self,
        name: str,
        label: str | None,
        source: WeightSource,
        windows: Windows,
        runtime: Runtime,
        dense: DenseEnd | None,
        on_end: Callable[[HiddenStates], None],
    ) -> None:
        super().__init__(name, label)
        self._source, self._windows, self._runtime = source, windows, runtime
        self._dense, self._on_end = dense, on_end
        self._head_tokens = _head_tokens(source) * (1 if dense is None else 2)
        self.more_tokens = int(self._head_tokens * int(windows.scored_N.sum()))

    def visit(self, block: StreamedBlock) -> WindowSums | None:
        if block.index + 1 < self._source.architecture.block_count:
            block.advance()
            return None
        head = Head(self._source, self._runtime.device, self._runtime.dtype)
        sums = no_sums(compared=self._dense is not None)
        adding = _Sums(head, self._windows, block, self._head_tokens, self._dense, sums)
        block.advance(on_hidden=adding.add)
        self._on_end(block.hidden)
        return sums

    def save(self, result: WindowSums | None, directory: Path, block: int) -> None:
        write_atomically(directory / f"sums-{block}.json", json.dumps(result).encode())

    def load(self, directory: Path, block: int) -> WindowSums | None:
        found: WindowSums | None = json.loads((directory / f"sums-{block}.json").read_text("utf-8"))
        return found


def _head_tokens(source: WeightSource) -> float:
    """Return how many passes of a token through a block one through the head is worth."""
    blocks = parameters_within(source, f"{source.architecture.blocks}.")
    block = blocks / source.architecture.block_count
    return float(vocabulary_of(source.config) * text_config_of(source.config).hidden_size / block)


@dataclass
class _Sums:
    """Adds up what is measured of windows while they leave the last block, in their order."""

    head: Head
    windows: Windows
    block: StreamedBlock
    head_tokens: float
    dense: DenseEnd | None
    sums: WindowSums

    def add(self, input_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add a batch."""
        for hidden_TD in output_BTD:
            window = len(self.sums["loss"])
            tokens_T = self.windows.tokens_NT[window].to(hidden_TD.device)
            padding_N = self.windows.padding_N
            end = len(tokens_T) - (0 if padding_N is None else int(padding_N[window]))
            start = end - int(self.windows.scored_N[window])
            predicting = slice(start - 1, end - 1)
            dense_PD = None if self.dense is None else self.dense.hidden_of(window)[predicting]
            found = self._window(hidden_TD[predicting], tokens_T[start:end], dense_PD)
            for values, value in zip(self.sums.values(), found, strict=False):
                values.append(value)

    def _window(
        self, hidden_PD: Tensor, next_P: Tensor, dense_PD: Tensor | None
    ) -> tuple[float, float, int]:
        loss, divergence, agreed = 0.0, 0.0, 0
        size = max(1, LOGITS_AT_ONCE // self.head.vocabulary)
        for start in range(0, len(next_P), size):
            some = slice(start, start + size)
            logits_PV = self.head.logits(hidden_PD[some])
            loss += negative_log_likelihood(logits_PV, next_P[some])
            if dense_PD is not None:
                assert self.dense is not None
                found = divergence_and_agreement(logits_PV, self.dense.head.logits(dense_PD[some]))
                divergence, agreed = divergence + found[0], agreed + found[1]
            self.block.tokens_done(int(self.head_tokens * len(next_P[some])))
        return loss, divergence, agreed
