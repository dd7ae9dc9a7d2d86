"""When recovery evaluates and stops, and its learning rate: by steps, and by minutes."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.errors import UsageError
from cfsp.recovery.schedule import Schedule, rate_factor, schedule_of
from cfsp.recovery.settings import ENDLESS_STEPS, Adaptation, Limit, RecoverSettings, Training

CPU = torch.device("cpu")


def limited(clock: SimpleNamespace, seconds: float, most: int, **more: float) -> Schedule:
    """A schedule of so many seconds and evaluations at most."""
    asked: dict[str, Any] = {"seconds": seconds, "evaluation_steps": 2.0, **more}
    return Schedule(ENDLESS_STEPS, most, 0.0, now=lambda: clock.seconds, **asked)


def test_the_rate_rises_then_falls_to_zero():
    rates = [rate_factor(f / 200) for f in range(201)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[200] == pytest.approx(0.0)
    assert rates[105] == pytest.approx(0.5)
    assert rates[0] > 0


def test_one_limit_at_most():
    with pytest.raises(UsageError, match="--steps and --max-minutes are both given"):
        Limit(steps=1, minutes=1)
    with pytest.raises(UsageError, match=r"--steps must be a whole number, found 2\.5"):
        Limit(steps=cast(Any, 2.5))
    for wrong in ({"steps": 0}, {"minutes": 0.0}, {"minutes": math.nan}):
        with pytest.raises(UsageError, match=r"must be .* and at most 999999999, found"):
            Limit(**cast(Any, wrong))
    assert [Limit().in_steps(windows, 8) for windows in (1, 96, 97)] == [1, 12, 13]  # all of them
    assert Limit(steps=7).in_steps(100, 8) == 7
    assert Limit(minutes=1).in_steps(100, 8) == ENDLESS_STEPS


@pytest.mark.parametrize(
    ("steps", "asked", "once", "most"),
    [
        (10, None, False, 1), (80, None, False, 4), (80, None, True, 6), (800, None, False, 10),
        (10, 3, False, 3),
    ],
)  # fmt: skip
def test_evaluations_take_a_quarter_or_as_many_as_asked(steps, asked, once, most):
    """40 held-out windows, 4 in a step: with the teacher an evaluation takes as long as 5 steps.

    Where it thinks only once, the others take as long as 3.
    """
    how = Training(Limit(steps=steps), evaluations=asked, batch_windows=4)
    ready = SimpleNamespace(
        settings=RecoverSettings(("text",), training=how, adaptation=Adaptation("full")),
        text=SimpleNamespace(train=range(4000), held_out=range(40)),
        teacher="dense",
        started=0.0,
    )
    assert schedule_of(ready, 0, 0.0, thinks_once=once).most_evaluations == most


def test_steps_do_not_depend_on_time():
    clock = SimpleNamespace(seconds=0.0)
    schedule = Schedule(40, 4, 0.0, now=lambda: clock.seconds, after_training=50.0)
    clock.seconds = 500.0
    schedule.training_begins()
    clock.seconds = 1500.0
    schedule.step_done(10, CPU)
    assert schedule.fraction == 0.25
    assert schedule.evaluates
    # What came before training does not come again, what comes after it is still to come.
    assert schedule.seconds_left == pytest.approx(3000 + 50)
    schedule.step_done(11, CPU)
    assert not schedule.evaluates
    schedule.step_done(40, CPU)
    assert schedule.evaluates
    assert schedule.is_over


# Of an evaluation.
BATCHES = 4


def run(
    seconds: float, *, step: float, evaluation: float, most: int = 10, **more: float
) -> tuple[float, Counter[str], list[float]]:
    """Play a whole recovery; return seconds, what was done how often, and the fractions.

    Steps take as long as the first evaluation lets expect, but for `first_step`. That evaluation's
    first batch takes as long as one and `slow_batches` more. There is `load` before, and `after`.
    """
    clock, save, after = SimpleNamespace(seconds=0.0), more.get("save", 0.0), more.get("after", 0.0)
    times = {"after_training": after, "save_seconds": save}
    schedule = limited(clock, seconds, most, evaluation_steps=evaluation / step, **times)
    clock.seconds += more.get("load", 0.0)
    done: Counter[str] = Counter()
    fractions = []
    schedule.training_begins()
    clock.seconds += more.get("slow_batches", 0.0) * evaluation / BATCHES
    for batch in range(1, BATCHES + 1):
        clock.seconds += evaluation / BATCHES
        schedule.batch_evaluated(batch, BATCHES, CPU)
    schedule.training_begins()
    while not schedule.is_over:
        if schedule.evaluates:
            schedule.evaluated()
        clock.seconds += step if done["steps"] else more.get("first_step", step)
        done["steps"] += 1
        schedule.step_done(done["steps"], CPU)
        fractions.append(schedule.fraction)
        if schedule.evaluates:
            clock.seconds += evaluation + save
            done["evaluations"] += 1
        elif schedule.is_over:
            clock.seconds += save
    return clock.seconds + after, done, fractions


def test_two_minutes_with_slow_steps_and_slow_evaluations():
    """As with a vocabulary of 262k: one step and its evaluation do not fit."""
    asked: dict[str, Any] = {"step": 11, "evaluation": 60, "load": 8, "after": 20}
    with pytest.raises(UsageError) as error:
        run(120, **asked)
    assert str(error.value) == (
        "2 minutes are too short for one step of training and its evaluation, with what comes "
        "before and after; give 4 or more"
    )
    seconds, done, _ = run(4 * 60, **asked)
    assert seconds <= 4 * 60
    assert done["steps"] >= done["evaluations"] >= 1


def test_too_short_a_time_ends_while_the_model_is_judged_before_training():
    clock = SimpleNamespace(seconds=0.0)
    schedule = limited(clock, 70, 10)
    schedule.training_begins()
    clock.seconds += 8  # the first batch is slow
    schedule.batch_evaluated(1, 10, CPU)
    clock.seconds += 2
    schedule.batch_evaluated(2, 10, CPU)  # 16 of this evaluation, a step of 10, 20 of the next
    assert schedule.what_fits
    clock.seconds += 4
    with pytest.raises(UsageError, match="give 2 or more"):
        schedule.batch_evaluated(3, 10, CPU)


def test_what_fits_is_said_before_training_and_progress_is_that_of_time():
    clock = SimpleNamespace(seconds=0.0)
    schedule = limited(clock, 200, 10, after_training=20, save_seconds=1)
    clock.seconds = 10.0
    assert schedule.progress == 0.05
    schedule.training_begins()
    clock.seconds = 20.0
    schedule.batch_evaluated(1, 1, CPU)
    schedule.training_begins()
    # 180 s until all is written, evaluations of 11 s with saving in a quarter of what is left.
    assert schedule.what_fits == "time for about 25 steps and 3 evaluations"
    clock.seconds = 30.0
    schedule.step_done(1, CPU)  # twice as long as the evaluation let expect
    assert schedule.what_fits == "time for about 11 steps and 3 evaluations"
    assert schedule.progress == 0.15
    assert Schedule(4, 1, 0.0).what_fits == ""


@pytest.mark.parametrize(
    ("seconds", "asked", "steps", "evaluations", "least", "most"),
    [
        # A quick machine evaluates as often as asked.
        (600, {"step": 1, "evaluation": 2, "load": 20, "after": 30, "save": 1}, 1, 10, 590, 600),
        # A slow first step is forgotten.
        (300, {"step": 1, "evaluation": 1, "first_step": 60}, 200, 1, 0, 300),
        # One that was expected to be quicker is judged all the same.
        (60, {"step": 10, "evaluation": 5, "load": 20, "after": 5, "first_step": 40}, 1, 1, 0, 75),
    ],
)
def test_what_is_done_in_a_time(seconds, asked, steps, evaluations, least, most):
    took, done, _ = run(seconds, **asked)
    assert least <= took <= most
    assert done["steps"] >= steps
    assert done["evaluations"] >= evaluations


@given(
    step=st.floats(0.1, 60),
    evaluation=st.floats(0.1, 100),
    slow_batches=st.floats(0, 3),
    load=st.floats(0, 40),
    after=st.floats(0, 40),
    save=st.floats(0, 20),
    most=st.integers(1, 20),
)
def test_the_budget_holds(**asked):
    evaluations = 2 + asked["slow_batches"] / BATCHES
    needed = asked["load"] + evaluations * asked["evaluation"] + asked["step"]
    try:
        seconds, done, fractions = run(300, **asked)
    except UsageError:
        assert needed + asked["after"] + asked["save"] > 300 - 1e-6
        return
    assert seconds <= 300 + 1e-6
    assert 1 <= done["evaluations"] <= asked["most"]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_a_killed_run_has_only_what_is_left():
    clock = SimpleNamespace(seconds=0.0)
    schedule = limited(clock, 100, 1, evaluation_steps=0.5)
    clock.seconds = 5.0
    schedule.training_begins()
    schedule.go_on_from(80.0, 10.0, 0.7)
    assert schedule.seconds_left == pytest.approx(15)
    clock.seconds = 9.0
    schedule.step_done(1, CPU)
    assert 0.7 < schedule.fraction < 1
    for step in (2, 3):
        assert not schedule.is_over
        clock.seconds += 4.0
        schedule.step_done(step, CPU)
    assert schedule.is_over
    assert schedule.evaluates


def test_a_killed_run_goes_on_at_the_rate_that_it_had():
    """What was done before training, then and now, is no part of the run."""
    clock = SimpleNamespace(seconds=50.0)
    schedule = limited(clock, 100, 1, after_training=10)
    schedule.training_begins()
    clock.seconds = 60.0
    schedule.step_done(1, CPU)
    assert schedule.fraction == pytest.approx(10 / (10 + 10))
    saved = schedule.elapsed, schedule.begun, schedule.fraction
    clock.seconds = 4.0
    again = limited(clock, 100, 1, after_training=10)
    again.training_begins()
    again.go_on_from(*saved)
    clock.seconds += 4.0
    again.step_done(2, CPU)
    assert again.fraction == pytest.approx(14 / (14 + 14))


def test_there_are_no_more_evaluations_than_asked_however_long_each_takes():
    clock, at, steps = SimpleNamespace(seconds=0.0), [0.0], 0
    schedule = limited(clock, 1000, 10)
    schedule.training_begins()
    while not schedule.is_over:
        if schedule.evaluates:
            schedule.evaluated()
        clock.seconds += 1
        schedule.step_done(steps := steps + 1, CPU)
        if schedule.evaluates:
            at.append(schedule.fraction)
            clock.seconds += 30 if len(at) % 4 == 3 else 20
    assert 8 <= len(at) - 1 <= 10
    assert all(now - before > 0.0999 for before, now in pairwise(at[:-1]))  # the end is fixed
