"""Every choice of a recovery and its default, as values; importing this does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from cfsp.errors import UsageError
from cfsp.processes import process_count
from cfsp.settings import (
    BOS,
    BOS_HELP,
    LONGEST_WINDOW,
    MOST_WINDOWS,
    Bos,
    Compute,
    Declared,
    EvaluationText,
    Text,
    option,
)

Method = Literal["lora", "full"]
RankAllocation = Literal["uniform", "importance", "inverse"]
# Peak learning rates, relative to the root mean square of the weights. Adam moves a weight by about
# the rate in a step, however large its gradient is; what that does depends on how large weights
# are: .19 in SmolLM2-135M, .019 in Qwen2.5-0.5B, which a rate that suits the first destroys.
# In full training they also fall with the root of a held-out loss below 1 (`Schedule`).
RELATIVE_RATES: dict[Method, float] = {"lora": 1e-2, "full": 1e-3}
# Who teaches: the dense model that was pruned, where it is at hand, or nobody.
AUTO_TEACHER, NO_TEACHER = "auto", "none"

# Of each text at least so many tokens are read, so that what is held out says something; and of one
# that may have no end, or in minutes that do not tell how many are needed, no more than fit.
_LEAST_TOKENS = 1 << 17
MOST_TOKENS = 50_000_000
_TOKENS_IN_A_SECOND = 10_000

# Far beyond any run; what a run that the clock ends reports to the Trainer as its steps.
ENDLESS_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Adaptation(Declared):
    """What is trained; embeddings, norms and head stay as they are."""

    method: Method = option(
        "lora",
        "low-rank adapters (lora), or all projections and experts in full, which needs 16 bytes "
        "for each parameter",
        choices=get_args(Method),
    )
    rank: float = option(
        8.0, "of the adapters, mean over blocks", kind=float, least=1, most=1 << 24, metavar="R"
    )
    allocation: RankAllocation = option(
        "uniform",
        "ranks are equal, follow the blocks' importance, or follow its inverse",
        flag="rank-allocation",
        choices=get_args(RankAllocation),
        advanced=True,
    )


@dataclass(frozen=True)
class Limit(Declared):
    """When training ends: after so many steps or minutes, or after one pass over the text."""

    minutes: float | None = option(
        None,
        "for everything: loading, training, measuring, writing",
        kind=float,
        above=0,
        most=ENDLESS_STEPS - 1,
        flag="max-minutes",
        metavar="M",
    )
    steps: int | None = option(
        None,
        "optimizer steps",
        kind=int,
        least=1,
        most=ENDLESS_STEPS - 1,
        default="one pass over the text",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes is not None and self.steps is not None:
            raise UsageError("--steps and --max-minutes are both given; give one of them")

    def in_steps(self, windows: int, windows_in_step: int) -> int:
        """Return the most optimizer steps."""
        if self.minutes is not None:
            return ENDLESS_STEPS
        return self.steps or math.ceil(windows / windows_in_step)


@dataclass(frozen=True)
class Training(Declared):
    """How to train; without a learning rate by what suits the method and the weights' size."""

    limit: Limit = Limit()
    learning_rate: float | None = option(
        None,
        "at its peak",
        kind=float,
        above=0,
        metavar="LR",
        default="of the weights' root mean square "
        + ", ".join(f"{rate:.1%} for {method}" for method, rate in RELATIVE_RATES.items())
        + " (times the root of a held-out loss below 1)",
    )
    batch_windows: int = option(
        2, "windows in a step, of each process", kind=int, least=1, most=MOST_WINDOWS, metavar="N"
    )
    seqlen: int = option(
        512, "tokens in a window to train on", kind=int, least=8, most=LONGEST_WINDOW, metavar="T"
    )
    evaluations: int | None = option(
        None,
        "on held-out windows in the run, at most",
        kind=int,
        least=1,
        default="10, or fewer that take a quarter of the time",
        advanced=True,
    )
    gradient_checkpointing: bool = option(
        False, "less memory, a third more time", switch=True, default=""
    )
    shard: bool = option(
        False,
        "under torchrun: each process holds a part of model, teacher and optimizer (FSDP2)",
        switch=True,
        default="",
    )
    seed: int = option(
        0,
        "of the order of windows and of the adapters' start",
        kind=int,
        least=0,
        most=(1 << 32) - 1,
        advanced=True,
    )
    bos: Bos = option("auto", BOS_HELP, choices=BOS, advanced=True)
    own_chats: int = option(
        128,
        "chats that the dense model begins, to be learnt from beside the text where it has a chat "
        "template and teaches alone, in one process, and the run is long enough",
        kind=int,
        least=0,
        most=MOST_WINDOWS,
        advanced=True,
    )
    teacher_weight: float = option(
        1.0,
        "of the teacher against the text, in [0, 1]: some text wins back more perplexity, and "
        "leads away from the dense model's predictions and answers",
        kind=float,
        least=0,
        most=1,
        advanced=True,
    )

    @property
    def windows_in_step(self) -> int:
        """The windows of an optimizer step, over all processes."""
        return self.batch_windows * process_count()

    def most_tokens(self, texts: int) -> float:
        """Return the most tokens of one of so many texts that a run needs; infinite for a pass.

        Minutes are for as many as can be made from text in a small part of them.
        """
        limit = self.limit
        if limit.minutes is not None:
            some = 60 * limit.minutes * _TOKENS_IN_A_SECOND / texts
            return max(_LEAST_TOKENS, min(some, MOST_TOKENS))
        steps = math.inf if limit.steps is None else limit.steps
        return max(_LEAST_TOKENS, steps * self.windows_in_step * self.seqlen)


@dataclass(frozen=True)
class RecoverSettings:
    """Every choice of a recovery."""

    data: tuple[str | Text, ...]  # texts and conversations to train on
    training: Training
    adaptation: Adaptation = Adaptation()
    # A dense model to distil from; `auto` for the one that was pruned, if it is at hand and there
    # is memory for both; `none` for nobody.
    teacher: str = NO_TEACHER
    evaluation: EvaluationText = EvaluationText()  # before and after
    compute: Compute = Compute()  # also the dtype of the weights that are not trained

    def __post_init__(self) -> None:
        if self.compute.dtype == "float16":
            raise UsageError("recovery trains in float32 or bfloat16, found --dtype float16")
        kind, _, number = self.compute.device.partition(":")
        if number.strip("0"):
            variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(kind)
            way = f"start it with {variable}={number}" if variable else "let it see that one alone"
            raise UsageError(
                f"recovery trains on the first accelerator that it sees, found --device {kind}:"
                f"{number}; {way} and --device {kind}"
            )
