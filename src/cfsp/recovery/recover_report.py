"""What a recovery did, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.recovery.evaluation import Perplexities


@dataclass(frozen=True)
class TrainingOutcome:
    """What training did.

    Attributes:
        steps: optimizer steps, those before an interruption included.
        best_step: the step with the lowest held-out loss, whose weights were kept; 0 where training
            made it no lower than it was.
        tokens_in_step: tokens of one step, over all processes.
        tokens_per_second: of training, without evaluations.
        history: step, held-out perplexity and loss at each evaluation, the first before training.
    """

    steps: int
    best_step: int
    tokens_in_step: int
    tokens_per_second: float
    history: list[dict[str, float]]


@dataclass(frozen=True)
class RecoverReport(TrainingOutcome):
    """What recovery did. Everything is also in the manifest.

    Attributes:
        trainable_parameters: in all.
        blocks: rank and trainable parameters of each block.
        perplexity: text -> {"before", "after", "tokens", "windows", "seqlen", "stride", "bos"}, if
            it was measured.
        seconds: stage -> seconds.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint.
    """

    trainable_parameters: int
    blocks: list[dict[str, int | None]]
    perplexity: Perplexities
    seconds: dict[str, float]
    peak_rss_bytes: int
    out: str
