"""Settings are checked when they are made, and say what they mean."""

import json
import re
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

import cfsp
from builders import statistics_with_distances
from cfsp.errors import CheckpointError, TextError, UsageError
from cfsp.quality.answers import Questions
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.recovery.settings import Training
from cfsp.settings import (
    PARTS,
    Budget,
    CalibrationText,
    Compute,
    EvaluationText,
    Goal,
    MaxLossIncrease,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
    TimingConditions,
    Workload,
    check_names,
    from_names,
    prune_settings,
)
from cfsp.settings.options import parse_size


def test_parts_are_kept_in_one_order():
    assert Budget().parts == ("ffn",)
    assert Budget(parts="blocks, ffn").parts == Budget(parts=["blocks", "ffn"]).parts
    assert Budget(parts=("blocks", "ffn")).parts == ("ffn", "blocks")


def test_a_goal_brings_the_parts_that_it_is_met_by():
    assert Budget().for_goal(TargetParameters(0.5)) == Budget()
    assert Budget().for_goal(TargetKVCache(0.5), leaves_parts_open=True) == Budget(parts="kv")
    for parts in ("ffn,kv", "ffn"):
        with pytest.raises(UsageError, match=f"and nothing else; found --parts {parts}:"):
            prune_settings({"target_kv_cache": 0.5, "parts": parts})


GOALS_BY_FLAG: dict[str, Goal | None] = {
    "--target-params": TargetParameters(0.5),
    "--target-kv-cache": TargetKVCache(0.5),
    "--target-speedup": TargetSpeedup(1.5),
    "--max-loss-increase": MaxLossIncrease(0.5),
    "--sparsity": None,
}
ALONE = [("attention",), ("experts",)]
TOGETHER = [part for part in PARTS if (part,) not in ALONE]
SOME_PARTS = [parts for n in range(1, 4) for parts in combinations(TOGETHER, n)] + ALONE


@pytest.mark.parametrize("flag", GOALS_BY_FLAG)
def test_what_is_hinted_at_is_accepted(flag):
    goal, refused = GOALS_BY_FLAG[flag], 0
    for parts in SOME_PARTS:
        try:
            Budget(parts=parts).for_goal(goal)
        except UsageError as error:
            refused += 1
            pattern = (
                r"found --parts (\S+): (?:name of (.+) alone, or give|several share one target,) "
            )
            hint = re.search(rf"{pattern}([^;]+)", str(error))
            assert hint is not None and hint[1] == ",".join(parts)
            if hint[2]:
                Budget(parts=hint[2]).for_goal(goal)
            for other in re.split(", | or ", hint[3]):
                Budget(parts=parts).for_goal(GOALS_BY_FLAG[other])
    assert (refused > 0) is (flag != "--target-params")


def test_a_call_asks_by_the_names_of_options():
    given = {"target_params": "70%", "bos": "yes", "eval": "a.txt", "data": "b.txt"}
    given["effort"] = "fast"
    found = prune_settings(given)
    assert found == prune_settings(given | {"target_params": None}, TargetParameters(0.7))
    assert found.goal == TargetParameters(0.7) and found.repair == "none"
    assert found.text == CalibrationText(("b.txt",), bos="yes")
    assert found.evaluation == EvaluationText(("a.txt",), bos="yes")
    assert found.leaves_parts_open
    assert not prune_settings(given | {"parts": "ffn"}).leaves_parts_open
    with pytest.raises(UsageError, match="--target-speedup-of belongs to --target-speedup"):
        prune_settings(given | {"target_speedup_of": "prefill"})


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 20])
def test_a_sparsity_is_a_share(sparsity):
    with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\)"):
        Budget(sparsity)


def test_options_are_found_by_their_names():
    asked = {"device": "cpu", "batch_windows": 2, "of_another": 1}
    assert from_names(Compute, asked) == Compute("cpu", batch_windows=2)
    with pytest.raises(UsageError, match="unknown argument devise; did you mean device"):
        check_names(cfsp.recover, {"devise": "cpu"}, Compute)
    with pytest.raises(UsageError, match=r"unknown argument stpes; did you mean steps\?"):
        check_names(cfsp.recover, {"stpes": 2}, Compute)


def test_a_text_is_read_as_on_a_command_line():
    found = from_names(Budget, {"multiple": "auto"}, sparsity="20%", parts="ffn,kv")
    assert found == Budget(0.2, parts=("ffn", "kv"))
    assert Budget(keep=0).keep == ("0",)  # type: ignore[arg-type]
    assert from_names(Compute, {"memory_budget": "2GB"}).memory_budget == 2_000_000_000
    with pytest.raises(UsageError, match=r"found 'float31'; did you mean float32\?"):
        from_names(Compute, {"dtype": "float31"})
    with pytest.raises(UsageError, match="samples must be a number, found 'many'"):
        from_names(CalibrationText, {"samples": "many"})
    assert from_names(Compute, {"memory_budget": 2e9}) == Compute(memory_budget=parse_size("2GB"))
    with pytest.raises(UsageError, match="--shard must be True or False, found 'no'"):
        Training(shard="no")  # type: ignore[arg-type]
    assert not Training().shard


def test_what_is_torch_s_own_is_its_name():
    found = Compute(torch.device("cuda", 1), torch.bfloat16)  # type: ignore[arg-type]
    assert (found.device, found.dtype) == ("cuda:1", "bfloat16")
    for wrong in (torch.float64, torch.tensor(1)):
        with pytest.raises(UsageError, match="--dtype must be one of auto, float32"):
            Compute(dtype=wrong)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_those_of_python():
    found = Budget(np.float32(0.25), multiple=np.int64(4))  # type: ignore[arg-type]
    goal = TargetParameters(np.float32(0.5))  # type: ignore[arg-type]
    work = Workload(np.int64(2)), TimingConditions(rounds=np.int64(3))  # type: ignore[arg-type]
    read = EvaluationText("a.txt", np.int64(5), np.int64(64))  # type: ignore[arg-type]
    tasks = TaskSelection(("piqa",), limit=np.int64(7))  # type: ignore[arg-type]
    values = (found.sparsity, found.multiple, goal.fraction, work[0].batch, work[1].rounds)
    others = (read.windows, read.seqlen, tasks.limit)
    assert json.dumps([*values, *others]) == "[0.25, 4, 0.5, 2, 3, 5, 64, 7]"
    assert Questions.of(np.int64(3)) == Questions.of(3)  # type: ignore[arg-type]


PRUNED: Any = partial(cfsp.prune, "no-model", out="out", sparsity=0.2)
RECOVERED: Any = partial(cfsp.recover, "no-model", out="out")
PLANNED: Any = partial(cfsp.plan, "no-model")
TIMED: Any = partial(cfsp.bench, "no-model")
EVALUATED: Any = cfsp.evaluate
STATISTICS = statistics_with_distances([0.1])
NO_TEXT = "3 is neither a file nor a known text"
NO_MODEL = "path of a model, found a "
NO_OUTPUT = "needs out=|expected out=, .* found "


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: cfsp.prune("no-model", out="out", goal=0.7), "goal must be TargetParameters"),
        (lambda: PRUNED(sparsity=[0.2]), r"--sparsity must be a number, found \[0.2\]"),
        (lambda: PRUNED(samples=8.0), "--samples must be a whole number, found 8.0"),
        (lambda: PRUNED(seed=True), "--seed must be a whole number, found True"),
        (lambda: PRUNED(seed=None), "--seed must be a whole number, found None"),
        (lambda: PRUNED(device=0), "--device must be text, found 0"),
        (lambda: PRUNED(memory_budget=-5), "--memory-budget must be at least 0, found -5"),
        (lambda: PRUNED(parts=3), "--parts must be of .* found 3"),
        (lambda: PRUNED(effort=[3]), r"effort must be one of .* found \[3\]"),
        (lambda: PRUNED(repair=3), "repair must be one of .* found 3"),
        (
            lambda: PRUNED(sparsity=None, goal=TargetParameters(0.7), target_params=0.5),
            "exactly one .* found --target-params and --target-params",
        ),
        (lambda: PLANNED(STATISTICS, goal=0.7), "goal must be TargetParameters"),
        (
            lambda: PLANNED("cfsp.statistics", sparsity=0.2),
            r"expected statistics, .* found 'cfsp\.statistics'",
        ),
        (lambda: RECOVERED(max_minutes="ten"), "max_minutes must be a number, found 'ten'"),
        (lambda: RECOVERED(seqlen=None), "must be a .*number, found None"),
        (lambda: RECOVERED(rank=None), "must be a .*number, found None"),
        (
            lambda: EVALUATED("no-model", "mixed", seqlen="64"),
            "--seqlen must be a whole number, found '64'",
        ),
        (lambda: TIMED(prompt="x"), "--prompt must be a whole number, found 'x'"),
        (lambda: TIMED(batch=2.5), r"--batch must be a whole number, found 2\.5"),
        (lambda: TIMED(rounds=1.5), r"--rounds must be a whole number, found 1\.5"),
        (lambda: TIMED(batch=[]), "expected one batch=, .* found an empty list"),
        # What is no text is taken for the name of one.
        *(
            (lambda ask=ask, data=data: ask(data=data), NO_TEXT)
            for ask in (PRUNED, RECOVERED)
            for data in (3, [3], np.array(3))
        ),
        (lambda: EVALUATED([], "mixed"), "there is no model to"),
        (lambda: cfsp.bench([]), "at least one model to"),
        (lambda: EVALUATED(3, "mixed"), f"{NO_MODEL}int"),
        (lambda: cfsp.bench(3), f"{NO_MODEL}int"),  # type: ignore[arg-type]
        # Nor is it printed where its name is expected.
        (lambda: EVALUATED("no-model", "mixed", against=object()), f"{NO_MODEL}object"),
        (lambda: RECOVERED(teacher=object()), f"{NO_MODEL}object"),
        *(
            (lambda ask=ask, out=out: ask(out=out), f"{NO_OUTPUT}{out}")
            for ask in (PRUNED, RECOVERED, partial(cfsp.export, "no-model", to="gguf"))
            for out in (None, 3)
        ),
        *(
            (lambda use=use: use([5]), r"expected a path, found \[5\]")
            for use in (cfsp.Statistics.load, cfsp.PruningPlan.load, STATISTICS.save)
        ),
        (lambda: cfsp.export("no-model", [5], "out"), r"unknown target \[5\]"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_told_whatever_is_asked(ask, message):
    named = CheckpointError if message.startswith(NO_MODEL) else UsageError
    with pytest.raises(TextError if message == NO_TEXT else named, match=message):
        ask()


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2_000_000_000), ("512MiB", 512 << 20), ("0", 0), ("1.5 kb", 1500), ("1e9", 10**9),
     ("3g", 3_000_000_000), ("1TiB", 1 << 40)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "1.2.3", "5iB", "many"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match=r"expected a size such as 2GB or 512MiB, found"):
        parse_size(text)
