"""Every choice of a recovery and its default, as values; importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from cfsp.errors import UsageError
from cfsp.processes import process_count
from cfsp.settings import BOS, BOS_HELP, Bos, Compute, Declared, EvaluationText, Text, option

Method = Literal["auto", "lora", "full"]
Targets = Literal["mlp", "attention", "all"]
RankAllocation = Literal["uniform", "importance", "inverse"]
METHODS: tuple[Method, ...] = get_args(Method)
TARGETS: tuple[Targets, ...] = get_args(Targets)
RANK_ALLOCATIONS: tuple[RankAllocation, ...] = get_args(RankAllocation)
# Peak learning rates, relative to the root mean square of the weights. Adam moves a weight by about
# the rate in a step, however large its gradient is; what that does depends on how large weights
# are: .19 in SmolLM2-135M, .019 in Qwen2.5-0.5B, which a rate that suits the first destroys.
RELATIVE_RATES: dict[Method, float] = {"lora": 5e-3, "full": 1e-3}
# Who teaches: the dense model that was pruned, where it is at hand, or nobody.
AUTO_TEACHER, NO_TEACHER = "auto", "none"

# Far beyond any run; what a run that the clock ends reports to the Trainer as its steps.
ENDLESS_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Adaptation(Declared):
    """What is trained; embeddings, norms and head stay as they are."""

    method: Method = option(
        "auto",
        "low-rank adapters (lora), or all projections in full: better in the same time, and needs "
        "16 bytes for each parameter; auto: full where one process has that memory",
        choices=METHODS,
    )
    targets: Targets = option("all", "projections to train", choices=TARGETS, advanced=True)
    rank: float = option(
        8.0, "of the adapters, mean over blocks", kind=float, least=1, most=1 << 24, metavar="R"
    )
    allocation: RankAllocation = option(
        "uniform",
        "ranks are equal, follow the blocks' importance, or follow its inverse",
        flag="rank-allocation",
        choices=RANK_ALLOCATIONS,
        advanced=True,
    )


@dataclass(frozen=True)
class Limit:
    """When training ends: exactly one of the three."""

    minutes: float | None = option(
        None,
        "for everything: loading, training, measuring, writing",
        kind=float,
        flag="max-minutes",
        metavar="M",
        default="",
    )
    steps: int | None = option(None, "optimizer steps", kind=int, metavar="N", default="")
    epochs: float | None = option(None, "passes over the text", kind=float, metavar="N", default="")

    def __post_init__(self) -> None:
        given = [v for v in (self.steps, self.epochs, self.minutes) if v is not None]
        if len(given) != 1:
            raise UsageError(
                "expected exactly one of --steps, --epochs and --max-minutes, "
                f"found {len(given)} of them"
            )
        if not 0 < given[0] < ENDLESS_STEPS:
            raise UsageError(
                f"the length of training must be positive and below {ENDLESS_STEPS:,}, "
                f"found {given[0]}"
            )

    @property
    def seconds(self) -> float | None:
        """The minutes in seconds."""
        return None if self.minutes is None else self.minutes * 60

    def in_steps(self, windows: int, windows_in_step: int) -> int | None:
        """Return the number of optimizer steps; None if only the clock decides."""
        if self.epochs is not None:
            return max(1, round(self.epochs * windows / windows_in_step))
        return self.steps


@dataclass(frozen=True)
class Training(Declared):
    """How to train; without a learning rate by what suits the method and the weights' size."""

    limit: Limit
    learning_rate: float | None = option(
        None,
        "at its peak",
        kind=float,
        above=0,
        metavar="LR",
        default="of the weights' root mean square "
        + ", ".join(f"{rate:.1%} for {method}" for method, rate in RELATIVE_RATES.items()),
    )
    batch_windows: int = option(
        4, "windows in a step, of each process", kind=int, least=1, metavar="N"
    )
    seqlen: int = option(512, "tokens in a window to train on", kind=int, least=8, metavar="T")
    evaluations: int = option(
        10, "on held-out windows in the run, at most", kind=int, least=1, advanced=True
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

    @property
    def windows_in_step(self) -> int:
        """The windows of an optimizer step, over all processes."""
        return self.batch_windows * process_count()

    def with_rate_for(self, method: Method, weights: float) -> Training:
        """Return the same with the rate that suits the root mean square of weights, if none is."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=float(f"{RELATIVE_RATES[method] * weights:.3g}"))


@dataclass(frozen=True)
class Distillation(Declared):
    """How much a teacher counts; the loss on the text gets the rest."""

    weight: float = option(
        1.0,
        "of the teacher against the text, in [0, 1]: some text wins back more perplexity, and "
        "leads away from the dense model's predictions and answers",
        kind=float,
        least=0,
        most=1,
        flag="teacher-weight",
        advanced=True,
    )


@dataclass(frozen=True)
class RecoverSettings:
    """Every choice of a recovery."""

    data: tuple[str | Text, ...]  # texts and conversations to train on
    training: Training
    adaptation: Adaptation = Adaptation()
    # A dense model to distil from; `auto` for the one that was pruned, if it is at hand and there
    # is memory for both; `none` or None for nobody.
    teacher: str | None = None
    distillation: Distillation = Distillation()
    evaluation: EvaluationText = EvaluationText()  # before and after
    compute: Compute = Compute()  # also the dtype of the weights that are not trained

    def __post_init__(self) -> None:
        if self.compute.dtype == "float16":
            raise UsageError("recovery trains in float32 or bfloat16, found --dtype float16")
        if self.leaves_method_open and self.training.learning_rate is not None:
            raise UsageError("--learning-rate suits one method; give --method lora or full with it")

    @property
    def leaves_method_open(self) -> bool:
        """Whether memory decides on the method: nothing is chosen that only adapters have."""
        return self.adaptation == Adaptation(targets=self.adaptation.targets)
