"""What is timed, and under which conditions.

Shapes: B sequences, P prompt tokens, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.errors import UsageError, did_you_mean

# For how long rounds that other programs disturb are measured again, all workloads together.
PATIENCE_SECONDS = 30.0
# Which fraction of the processors others may take where a ratio is still said.
TOO_BUSY = 0.2
ENGINES = ("transformers", "compile", "llama.cpp", "vllm")


@dataclass(frozen=True)
class Workload:
    """Prefill of a prompt, then generation of new tokens, one by one for each sequence.

    Attributes:
        batch: sequences B at once.
        prompt: prompt tokens P of each.
        new_tokens: tokens N generated for each after the first, which the prefill gives.
    """

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least 1, found {value}")

    def describe(self) -> str:
        """Return one line for people."""
        return f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Conditions:
    """How to measure.

    Attributes:
        engine: one of `ENGINES`.
        warmups: untimed runs of each workload before the rounds; their first is reported.
        rounds: timed runs of each model, in turns.
        disturbance: a round is measured again while other programs take more than this
            fraction of the processors, but no longer than `PATIENCE_SECONDS`.
        device: as for prune; the engines transformers and compile only.
        dtype: what weights are computed in; the engines transformers and compile only.
        threads: threads of each process; None for the engine's own choice.
    """

    engine: str = "transformers"
    warmups: int = 2
    rounds: int = 7
    disturbance: float = 0.05
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(
                f"the engine is one of {', '.join(ENGINES)}, found {self.engine!r}"
                f"{did_you_mean(self.engine, ENGINES)}"
            )
        if self.warmups < 1 or self.rounds < 1:
            raise UsageError(
                f"expected at least 1 warm-up and 1 round, found {self.warmups} and {self.rounds}"
            )
        if not self.disturbance >= 0:
            raise UsageError(f"disturbance must be at least 0, found {self.disturbance}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads must be at least 1, found {self.threads}")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of a workload.

    Attributes:
        prefill: until the first new token is known, so also the time to first token.
        decode: all further tokens.
        disturbance: fraction of all processors that other programs took meanwhile.
    """

    prefill: float
    decode: float
    disturbance: float = 0.0
