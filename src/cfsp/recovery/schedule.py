"""When to train, to evaluate and to stop, and the learning rate over a run.

A run is limited by steps or by time. The learning rate rises in the first few percent and then
falls along a cosine to zero at the end; where time is the limit, the part of the time that has
passed takes the place of the part of the steps, so that the cosine is complete however fast the
machine.

Time is a promise about the whole recovery. Steps and evaluations are measured as they happen, and
what comes after training (the last evaluation, the output, perplexity) is kept free for. A step or
an evaluation begins only if it fits. The evaluation before the first step tells how long that step
will take; if it and its evaluation do not fit, the time is refused.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cfsp.architecture.block_names import counted
from cfsp.errors import RecoveryError, UsageError
from cfsp.progress import item_progress
from cfsp.recovery.loss import diverged
from cfsp.recovery.prepare import Prepared
from cfsp.streaming.work_dir import PassState

logger = logging.getLogger(__name__)

# The part of the run in which the learning rate rises, and where it begins.
_WARM_UP = 0.05
_LOWEST_WARM_UP = 0.05
_MOST_EVALUATIONS = 10  # as many, unless a number is asked for
# Of the time for training; evaluations that would take more are left out.
_EVALUATIONS_SHARE = 0.25
# A slow disk writes so much; better is measured as soon as something is written.
BYTES_PER_SECOND = 200e6
# Nothing takes the same time twice: so much more time is advised than was predicted.
MARGIN = 1.15
_PARTS = 1000  # of the progress bar


def rate_factor(fraction: float) -> float:
    """Return what the peak learning rate is multiplied by, after a fraction of the run."""
    if fraction < _WARM_UP:
        return max(_LOWEST_WARM_UP, fraction / _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (fraction - _WARM_UP) / (1 - _WARM_UP)))


@dataclass
class Schedule:
    """What a run does after each of its steps, the same on every process.

    It ends after so many steps or, where there are `seconds`, when these are over.
    Where `follows_loss`, the rate falls with the root of the held-out loss before training: the
    less there is to learn the nearer it is. KL grows with the square of the way, and Adam's way is
    the rate's. A loss above 1 leaves the rate as it is.
    """

    most_steps: int
    most_evaluations: int  # the one at the end included
    started: float  # when the work of this process began, by the clock `now`
    seconds: float | None = None  # of the whole recovery
    after_training: float = 0.0  # of them
    evaluation_steps: float = 1.0  # that an evaluation takes as long as, estimated
    save_seconds: float = 0.0
    follows_loss: bool = False
    now: Callable[[], float] = field(default_factory=lambda: time.monotonic)
    begun: float = 0.0  # seconds of work before training: it took `elapsed` less these
    fraction: float = 0.0  # of the run that is over
    rate_scale: float = 1.0  # of the peak learning rate
    evaluates: bool = False  # and saves, after the step that was noted last
    is_over: bool = False
    training_seconds: float = 0.0  # of all steps, without evaluations

    def __post_init__(self) -> None:
        # When what is measured now began, and the batches of an evaluation but the first.
        self._mark = self._warm = 0.0
        self._evaluated = 0.0  # the fraction at which it evaluated last
        # Of the last few: the first step is slow, and machines change.
        self._step_seconds: deque[float] = deque(maxlen=3)
        self._evaluation_seconds: deque[float] = deque(maxlen=3)

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return self.now() - self.started

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        if self.seconds is None:
            return self.after_training + (self.elapsed - self.begun) * (1 / self.fraction - 1)
        return max(0.0, self.seconds - self.elapsed)

    @property
    def progress(self) -> float:
        """Part of the whole work that is over, in [0, 1]."""
        return self.fraction if self.seconds is None else min(1.0, self.elapsed / self.seconds)

    @property
    def what_fits(self) -> str:
        """How many more steps and evaluations the time is enough for, if that is the limit."""
        if self.seconds is None or self.is_over:
            return ""
        left, evaluations = self._left()
        left -= (evaluations - 1) * self._seconds_of_evaluation()
        steps = max(1, int(left / self._seconds_of_step()))
        evaluations -= math.floor(self.fraction * evaluations)
        return f"time for about {counted(steps, 'steps')} and {counted(evaluations, 'evaluations')}"

    def go_on_from(self, elapsed: float, begun: float, fraction: float) -> None:
        """Count what an interrupted run had done; what was before it began is no training."""
        self.started -= elapsed
        self.begun += begun
        self.fraction = self._evaluated = fraction  # it saves where it evaluates
        self._mark = self.elapsed

    def begins_at(self, loss: float) -> None:
        """Note the held-out loss before training."""
        if self.follows_loss:
            self.rate_scale = min(1.0, math.sqrt(loss))

    def training_begins(self) -> None:
        """Note that the first step begins, or the evaluation before it."""
        self.begun = self._mark = self._warm = self.elapsed

    def batch_evaluated(self, done: int, batches: int, device: torch.device) -> None:
        """Note how far the evaluation before the first step is: it tells what a step will take.

        Refuses a time that is too short. The first of several batches is slow, and tells nothing.
        """
        if self.seconds is None:
            return
        if done == 1 < batches:
            self._warm = self.elapsed
            return
        batch = (self.elapsed - self._warm) / max(1, done - 1)
        forward = batches * batch
        self._evaluation_seconds.clear()
        self._evaluation_seconds.append(forward + self.save_seconds)
        known = self.elapsed + self.after_training + self.save_seconds
        expected = (batches - done) * batch + forward / self.evaluation_steps + forward
        (too_short,) = _from_first_process((float(known + expected > self.seconds),), device)
        if too_short:
            raise UsageError(
                f"{self.seconds / 60:g} minutes are too short for one step of training and its "
                "evaluation, with what comes before and after; give "
                f"{math.ceil(MARGIN * (known + expected) / 60)} or more"
            )

    def evaluated(self) -> None:
        """Note that evaluating and saving are done and the next step begins."""
        self._evaluation_seconds.append(self.elapsed - self._mark)
        self._mark = self.elapsed

    def step_done(self, step: int, device: torch.device) -> None:
        """Note that so many steps are done, and decide; processes talk on `device`."""
        before, self._mark = self._mark, self.elapsed
        self._step_seconds.append(self._mark - before)
        self.training_seconds += self._mark - before
        fraction = min(1.0, step / self.most_steps)
        parts, is_over = self.most_evaluations, fraction >= 1
        evaluates = math.floor(fraction * parts) > math.floor(self.fraction * parts)
        if self.seconds is not None:
            step_seconds, trained = self._seconds_of_step(), self._mark - self.begun
            left, evaluations = self._left()
            is_over = left < step_seconds
            fraction = 1.0 if is_over else max(self.fraction, trained / (trained + left))
            # How many are worth it changes with what they take, and marks would move with it.
            evaluates = fraction >= self._evaluated + 1 / evaluations
            evaluates &= left >= self._seconds_of_evaluation() + step_seconds
            decision = _from_first_process((fraction, evaluates, is_over), device)
            fraction, evaluates, is_over = decision[0], bool(decision[1]), bool(decision[2])
        assert fraction >= self.fraction
        self.fraction, self.evaluates, self.is_over = fraction, evaluates or is_over, is_over
        if self.evaluates:
            self._evaluated = fraction

    def _left(self) -> tuple[float, int]:
        """Return the seconds until the last evaluation, and how many there are in the whole run."""
        assert self.seconds is not None
        left = self.seconds - self.after_training - self._mark
        evaluation = self._seconds_of_evaluation()
        worth = int(_EVALUATIONS_SHARE * (self._mark - self.begun + left) / evaluation)
        # The last weights are compared with those from before training.
        return left - evaluation, max(1, min(self.most_evaluations, worth))

    def _seconds_of_step(self) -> float:
        """Return what a step takes, measured or, before the first, estimated."""
        if self._step_seconds:
            return max(*self._step_seconds, 1e-6)
        forward = self._seconds_of_evaluation() - self.save_seconds
        return max(forward / self.evaluation_steps, 1e-6)

    def _seconds_of_evaluation(self) -> float:
        """Return what evaluating and saving take, measured or, where a run goes on, estimated."""
        if self._evaluation_seconds:
            return max(*self._evaluation_seconds, 1e-6)
        return self.evaluation_steps * self._seconds_of_step() + self.save_seconds


def schedule_of(
    ready: Prepared, trained_bytes: int, after_training: float, *, thinks_once: bool
) -> Schedule:
    """Return when to evaluate and to stop; of the minutes some seconds are needed afterwards."""
    text, training, has_teacher = ready.text, ready.settings.training, ready.teacher is not None
    # Backward through frozen weights takes as long as forward, and once more for the gradients of
    # all weights.
    trains_all = ready.settings.adaptation.method == "full"
    forwards = 2.5 + 0.5 * trains_all + has_teacher + training.gradient_checkpointing
    evaluation_steps = len(text.held_out) / training.windows_in_step * (1 + has_teacher) / forwards
    steps = training.limit.in_steps(len(text.train), training.windows_in_step)
    # After the first evaluation only the teacher's head is left: SmolLM2-135M took .45 to .55.
    later = evaluation_steps * (0.6 if thinks_once else 1)
    worth = max(1, int(_EVALUATIONS_SHARE * steps / later))
    return Schedule(
        steps,
        training.evaluations or min(_MOST_EVALUATIONS, worth),
        ready.started,
        seconds=training.limit.minutes and 60 * training.limit.minutes,
        # Then the best weights are read again.
        after_training=after_training + trained_bytes / BYTES_PER_SECOND,
        evaluation_steps=evaluation_steps,
        # The weights and AdamW's two moments.
        save_seconds=3 * trained_bytes / BYTES_PER_SECOND,
        follows_loss=trains_all and training.learning_rate is None,
    )


def _from_first_process(decision: tuple[float, ...], device: torch.device) -> tuple[float, ...]:
    """Return the first process's decision: clocks differ; learning rates and stops must not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision
    numbers = torch.tensor(decision, dtype=torch.float32, device=device)
    torch.distributed.broadcast(numbers, src=0)
    return tuple(numbers.tolist())


class Pace(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Evaluates, saves and stops when the schedule says so, and shows how far the run is.

    The Trainer saves its `state` with every checkpoint; when one is complete the first process,
    which alone has `work`, notes it there, to go on from.
    """

    def __init__(self, schedule: Schedule, work: PassState | None) -> None:
        # Step, held-out loss, and loss (none before the first step) at each evaluation.
        self.history: list[dict[str, float]] = []
        self.schedule, self._work = schedule, work
        self._bar: Any = None  # while it trains
        self._loss = math.nan
        self._tokens = 0  # of all steps, over all processes
        self._batches = 0  # of the evaluation that goes on, so far

    @property
    def tokens_per_second(self) -> float:
        """Rate of training in the whole run, without evaluations."""
        return self._tokens / max(self.schedule.training_seconds, 1e-6)

    def state(self) -> dict[str, Any]:
        """Return what an interrupted run goes on from."""
        return {
            "elapsed": round(self.schedule.elapsed, 3),
            "begun": round(self.schedule.begun, 3),
            "training_seconds": round(self.schedule.training_seconds, 3),
            "fraction": self.schedule.fraction,
            "history": self.history,
        }

    def take_up(self, state: Any) -> None:
        """Take up an interrupted run, from the state of its Trainer."""
        saved, self._tokens = saved_pace(state), state.num_input_tokens_seen
        # The Trainer sorts what it saves; a run that went on writes what one in one go does.
        order = ("step", "held_out", "loss")
        self.history = [
            {key: entry[key] for key in order if key in entry} for entry in saved["history"]
        ]
        self.schedule.training_seconds = saved["training_seconds"]
        self.schedule.go_on_from(saved["elapsed"], saved["begun"], saved["fraction"])
        self.schedule.begins_at(self.history[0]["held_out"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.schedule.training_begins()
        if state.global_step:
            self.take_up(state)
        self._open_bar()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Say how far an evaluation is, and note how long the one before the first step takes."""
        self._batches, batches = self._batches + 1, len(eval_dataloader)
        if not state.global_step:
            self.schedule.batch_evaluated(self._batches, batches, args.device)
        self._move_bar(f"held-out text {self._batches} of {batches}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the time of an evaluation from that of a step."""
        if self.schedule.evaluates:
            self.schedule.evaluated()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step, which the Trainer counts later; the learning rate is asked for next."""
        self.schedule.step_done(state.global_step + 1, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for what is due."""
        schedule, self._tokens = self.schedule, state.num_input_tokens_seen
        control.should_log |= schedule.evaluates
        control.should_save |= schedule.evaluates
        control.should_evaluate |= schedule.evaluates
        control.should_training_stop |= schedule.is_over
        rate = f"{self._loss_in_words()}{self.tokens_per_second:,.0f} tok/s"
        self._move_bar(f"step {state.global_step}, {rate}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that there is a checkpoint."""
        if self._work is not None:
            self._work.commit(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss."""
        self._loss = logs.get("loss", self._loss)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Say where the run is, and begin to train after the evaluation before the first step."""
        schedule, loss, step = self.schedule, metrics["eval_loss"], state.global_step
        self._batches = 0
        if not math.isfinite(loss):
            raise diverged(step, "the held-out loss", in_bfloat16=args.bf16)
        entry = {"step": step, "held_out": round(loss, 6)}
        if math.isfinite(self._loss):
            entry["loss"] = round(self._loss, 4)
        self.history.append(entry)
        if not step:
            if entry["held_out"] <= 0:
                raise RecoveryError(
                    "the loss on held-out text is 0 before training: the model predicts what its "
                    "teacher predicts, so there is nothing to win back; give the dense model to "
                    "--teacher, or none"
                )
            schedule.begins_at(entry["held_out"])
            # The rate of the first step was set before the loss was known.
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= schedule.rate_scale
        if self._work is not None:
            self._bar.clear()
            # Before the first step only the clock says how much there will be.
            peak = schedule.rate_scale * args.learning_rate
            rate = f"learning rate from {peak * rate_factor(0):.3g} up to {peak:.3g}"
            pace = ", ".join(filter(None, (rate, schedule.what_fits)))
            if step:
                left = int(schedule.seconds_left)
                pace = f"{self.tokens_per_second:,.0f} tokens/s, {left // 60}:{left % 60:02d} left"
            logger.info(
                f"step {step}, {schedule.progress:.0%}: {self._loss_in_words()}held-out loss "
                f"{loss:.4f}, {pace}"
            )
            if len(self.history) == 2 and loss >= self.history[0]["held_out"]:
                logger.warning(
                    "that is no better than before training; if it stays so nothing is written: a "
                    "lower --learning-rate may do better"
                )
        if not step:
            schedule.training_begins()
            self._bar.close()  # the time left is by steps, and that evaluation was none
            self._open_bar()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()

    def _loss_in_words(self) -> str:
        """Return the loss of the last steps that were logged; nothing before the first."""
        return "" if math.isnan(self._loss) else f"loss {self._loss:.3f}, "

    def _open_bar(self) -> None:
        done = round(self.schedule.progress * _PARTS)
        # An evaluation, which moves it nowhere, has something to say too.
        self._bar = item_progress("recover", _PARTS, "‰", initial=done, miniters=0)

    def _move_bar(self, said: str) -> None:
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(round(self.schedule.progress * _PARTS) - self._bar.n)


def saved_pace(state: Any) -> dict[str, Any]:
    """Return the state of the pace that a Trainer saved with its own."""
    return dict(state.stateful_callbacks[Pace.__name__])
