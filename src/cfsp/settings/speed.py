"""What to time models on, and how."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cfsp.settings.options import Declared, option
from cfsp.settings.pruning import AUTO_DTYPE, DTYPES

_MOST = 1 << 24  # sequences, or tokens of each

_count = partial(option, kind=int, least=1, most=_MOST)


@dataclass(frozen=True)
class Workload(Declared):
    """Prefill of a prompt, then generation of new tokens, one by one for each sequence.

    The prefill gives the first token already; `new_tokens` more are generated.
    """

    batch: int = _count(1, "sequences at once")
    prompt: int = _count(512, "prompt tokens of each")
    new_tokens: int = _count(32, "tokens generated for each")

    def describe(self) -> str:
        """Return one line for people."""
        return f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class TimingConditions(Declared):
    """How to measure."""

    warmups: int = 2  # untimed runs of each workload before the rounds
    rounds: int = option(7, "timed runs of each model, in turns", kind=int, least=1)
    device: str = option("auto", "cpu, cuda, mps, or auto: cuda where there is one")
    dtype: str = option("auto", "what to compute in", choices=DTYPES, default=AUTO_DTYPE)
