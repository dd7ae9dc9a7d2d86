"""Progress where there is no terminal: a plain line now and then, none for short work."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from cfsp import progress
from cfsp.cli.output import show_messages
from cfsp.progress import item_progress, library_progress
from cfsp.recovery.schedule import Pace, Schedule


@pytest.fixture
def clock(monkeypatch, caplog) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=1000.0)
    caplog.set_level(logging.INFO, "cfsp.progress")
    for place in ("cfsp.progress.monotonic", "tqdm.std.time"):
        monkeypatch.setattr(place, lambda: clock.seconds)
    monkeypatch.setattr(progress, "_LINES", progress._Lines())
    return clock


def test_blocks_tell_how_far_they_are(clock, caplog):
    with item_progress("calibrate", 1000, "tok") as bar:
        for block in range(1, 11):
            clock.seconds += 20
            bar.update(100)
            bar.set_postfix_str(f"block {block} of 10", refresh=False)
    assert caplog.messages == [
        "calibrate: 20%, block 1 of 10, 02:40 left",
        "calibrate: 40%, block 3 of 10, 02:00 left",
        "calibrate: 60%, block 5 of 10, 01:20 left",
        "calibrate: 80%, block 7 of 10, 00:40 left",
        "calibrate: 100%, block 9 of 10, 00:00 left",
    ]


def test_the_time_left_is_by_all_of_the_work_so_far(clock):
    with item_progress("ridge", 1000, "tok") as bar:
        for block in range(1, 6):
            for _ in range(10):
                clock.seconds += 1
                bar.update(10)
            clock.seconds += 10  # a solve, in which no token passes
            left = tqdm.format_interval(20 * (10 - block))
            assert str(bar) == f"ridge: {10 * block}%, {left} left"


def test_of_paths_the_last_part_is_shown_and_work_that_goes_on_counts_from_there(clock, caplog):
    with item_progress("/models/a.gguf on data/test.parquet", 1000, "tok", initial=800) as bar:
        clock.seconds += 40
        bar.update(100)
    assert caplog.messages == ["a.gguf on test.parquet: 90%, 00:40 left"]


def begun(clock: SimpleNamespace) -> tuple[Pace, Any, Any]:
    """Return the pace of a training of ten steps, and what a Trainer calls it with."""
    pace = Pace(Schedule(10, 2, 0.0, now=lambda: clock.seconds), None)
    args, state = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(global_step=0)
    pace.on_train_begin(args, state, None)
    return pace, args, state


def test_an_evaluation_of_recovery_tells_how_far_it_is(clock, caplog):
    pace, args, state = begun(clock)
    for steps in (5, 10):
        for _ in range(3):
            clock.seconds += 35
            pace.on_prediction_step(args, state, None, eval_dataloader=range(3))
        metrics, optimizer = {"eval_loss": 1.0}, SimpleNamespace(param_groups=())
        pace.on_evaluate(args, state, None, metrics, optimizer=optimizer)
        clock.seconds += 1
        state.global_step = steps - 1
        pace.on_optimizer_step(args, state, None)
    told = [line.rpartition(",")[0] for line in caplog.messages]
    of_each = [f"held-out text {batch} of 3" for batch in (1, 2, 3)]
    assert told == [f"recover: {part}%, {each}" for part in (0, 50) for each in of_each]


def test_the_time_that_training_takes_is_told_by_its_steps_alone(clock, caplog):
    pace, args, state = begun(clock)
    clock.seconds += 600  # the evaluation before the first step
    pace.on_prediction_step(args, state, None, eval_dataloader=range(1))
    pace.on_evaluate(
        args, state, None, {"eval_loss": 1.0}, optimizer=SimpleNamespace(param_groups=())
    )
    clock.seconds += 40
    state.global_step = 1
    pace.schedule.step_done(1, args.device)
    pace._move_bar("step 1")
    assert caplog.messages[-1] == "recover: 10%, step 1, 06:00 left"


def test_work_within_work_speaks_no_oftener(clock, caplog):
    with item_progress("sweep", 2, "model") as outer:
        for _ in range(2):
            with item_progress("plan", 30, "block") as inner:
                for _ in range(30):
                    clock.seconds += 5
                    inner.update()
            outer.update()
    times = 2 * 30 * 5 / progress.SECONDS_BETWEEN_LINES
    assert times - 2 <= len(caplog.messages) <= times
    assert caplog.messages[0].startswith("plan: 20%, ")


@pytest.mark.parametrize(("rank", "seconds"), [("0", 1), ("1", 3600)])
def test_short_work_is_quiet_and_one_process_speaks(clock, caplog, monkeypatch, rank, seconds):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    clock.seconds += 3600
    with item_progress("plan", 8, "block") as bar:
        for _ in range(8):
            clock.seconds += seconds
            bar.update()
    assert caplog.messages == []


def test_bars_of_a_library_are_lines_and_all_else_it_says_is_dropped(clock, capsys):
    show_messages()
    with library_progress(), tqdm(total=100, desc="requests") as bar:
        for _ in range(100):
            clock.seconds += 1
            bar.update()
            print("it chats", file=sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[0] for line in lines] == [
        "requests:  30%",
        "requests:  60%",
        "requests:  90%",
    ]


def test_what_we_say_is_told_while_a_library_has_standard_error(capsys):
    show_messages()
    with library_progress(), library_progress():
        logging.getLogger("cfsp.checkpoint").warning("it may compute something else")
        print("it chats", file=sys.stderr)
    assert capsys.readouterr().err == "it may compute something else\n"
