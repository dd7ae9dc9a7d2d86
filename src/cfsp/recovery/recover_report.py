"""What a recovery did, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cfsp.engine.memory import peak_rss_bytes
from cfsp.engine.stopwatch import Stopwatch
from cfsp.recovery.adaptation import TrainableBlock
from cfsp.recovery.evaluation import Perplexities
from cfsp.recovery.training import TrainingOutcome


@dataclass(frozen=True)
class RecoverReport:
    """What recovery did. Everything is also in the manifest.

    Attributes:
        trainable_parameters: in all.
        blocks: rank and trainable parameters of each block.
        steps: optimizer steps.
        tokens_in_step: tokens of one step, over all processes.
        tokens_per_second: of training, without evaluations.
        history: held-out perplexity and loss at each evaluation, the first before training.
        best_step: the step whose weights were kept.
        perplexity: text -> {"before", "after", "tokens", "windows", "seqlen", "stride", "bos"}, if
            it was measured.
        seconds: stage -> seconds.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint.
    """

    trainable_parameters: int
    blocks: list[dict[str, int | None]]
    steps: int
    tokens_in_step: int
    tokens_per_second: float
    history: list[dict[str, float]]
    best_step: int
    perplexity: Perplexities
    seconds: dict[str, float]
    peak_rss_bytes: int
    out: str


def recover_report(
    blocks: Sequence[TrainableBlock],
    outcome: TrainingOutcome,
    measured: Perplexities,
    watch: Stopwatch,
    out: Path,
) -> RecoverReport:
    """Put together what a recovery did."""
    return RecoverReport(
        trainable_parameters=sum(block.parameters for block in blocks),
        blocks=[asdict(block) for block in blocks],
        perplexity=measured,
        seconds=dict(watch.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out),
        **asdict(outcome),
    )
