"""Plans and statistics: damaged, of another version, of another model."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bad_inputs.catalogue import BadInput, Place, Table, edit_header, edit_json, edit_tensors

# What to do.
ANEW, AGAIN = "make a new plan", "calibrate again"
OBEY = "prune {model} --out {out} --repair none --plan {plan}"
PLAN = "plan {model} --statistics {statistics} --sparsity 0.4 --multiple 4 --out {out}"


def plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], object]:
    return lambda place: edit_json(place.plan, change)


def damaged(says: str, change: Callable[[dict[str, Any]], object]) -> BadInput:
    """Return a row of a plan with such fields."""
    return BadInput(OBEY, f"{{plan}} is damaged: {says}", ANEW, plan(change))


def stale(says: str, spoil: Callable[[Place], object]) -> BadInput:
    """Return a row of statistics that are to be made again."""
    return BadInput(PLAN, f"{{statistics}} {says}", AGAIN, spoil)


def kept(*channels: int) -> str:
    """Return channels as a plan's mask; one beyond 96 makes it longer."""
    mask = np.zeros(max(96, max(channels) + 1), dtype=bool)
    mask[list(channels)] = True
    return base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode()


def facts(old: str, new: str) -> Callable[[Place], object]:
    """Change the JSON text in the metadata of the statistics."""

    def change(header: dict[str, Any]) -> None:
        text = header["__metadata__"]["cfsp_statistics"]
        assert old in text
        header["__metadata__"]["cfsp_statistics"] = text.replace(old, new, 1)

    return lambda place: edit_header(place.statistics, change)


def sums(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Place], object]:
    return lambda place: edit_tensors(
        place.statistics, lambda tensors: tensors.update({name: make(tensors[name])})
    )


def raw(name: str, data: bytes) -> Callable[[Place], object]:
    def change(place: Place) -> None:
        path: Path = getattr(place, name)
        path.write_bytes(data)

    return change


PLANS: Table = {
    "plan for another model": BadInput(
        OBEY.replace("{plan}", "{other_plan}"),
        "not for {model} (llama, ",
        "an earlier cfsp, which knew models by fewer weights, wrote it; make a plan for this model",
    ),
    "plan of another version": BadInput(
        OBEY, "plan version 7, expected 1", ANEW, plan(lambda f: f.update(plan_version=7))
    ),
    "channels out of range": damaged(
        "kept channels do not fit a width of 96",
        lambda f: f["blocks"][0].update(kept=kept(0, 1, 150), kept_width=3),
    ),
    "fewer channels than announced, as if some came twice": damaged(
        "3 channels are kept, 4 are announced",
        lambda f: f["blocks"][0].update(kept=kept(0, 1, 2), kept_width=4),
    ),
    "a list of unsorted and repeated channels": BadInput(
        OBEY,
        "{plan} is damaged",
        ANEW,
        plan(lambda f: f["blocks"][0].update(kept=[5, 3, 3], kept_width=3)),
    ),
    "a block too few": BadInput(
        OBEY, "the plan's widths are not those of {model}", ANEW, plan(lambda f: f["blocks"].pop())
    ),
    "plan that keeps a trillion channels": damaged(
        "a block has the impossible width", lambda f: f["blocks"][0].update(width=10**12)
    ),
    "importance that is no number": damaged(
        "a block has the impossible distance nan",
        lambda f: f["blocks"][1].update(distance=float("nan")),
    ),
    "calibration without windows": damaged("'windows'", lambda f: f["calibration"].pop("windows")),
    "criterion without a multiple": damaged("'multiple'", lambda f: f["criterion"].pop("multiple")),
    "metric that is markup": damaged(
        "it has '<script>' for block_metric",
        lambda f: f["criterion"].update(block_metric="<script>"),
    ),
    "sparsity that is text": damaged(
        "the criterion has 'half' for sparsity", lambda f: f["criterion"].update(sparsity="half")
    ),
    "plan of no blocks": damaged("it describes no block", lambda f: f.update(blocks=[])),
    "fingerprint that is a list": damaged(
        "the model's name, type and fingerprint must be text",
        lambda f: f["model"].update(fingerprint=[1]),
    ),
    "plan nested too deeply": BadInput(
        OBEY, "{plan} is not a pruning plan", "cfsp plan", raw("plan", b"[" * 100_000)
    ),
    "plan that is binary": BadInput(
        OBEY, "cannot read the plan {plan}", "cfsp plan", raw("plan", b"\xff\xfe\x00")
    ),
    "plan that is not there": BadInput(
        "prune {model} --out {out} --repair none --plan {inputs}/absent.json",
        "cannot read the plan {inputs}/absent.json",
        "cfsp plan",
    ),
    "plan in the checkpoint is damaged": BadInput(
        "recover {pruned} --data {text} --steps 1 --seqlen 32 --out {out}",
        "{pruned}/cfsp_plan.json is damaged",
        ANEW,
        lambda place: edit_json(
            place.pruned / "cfsp_plan.json", lambda f: f["blocks"][0].update(importance="high")
        ),
    ),
}

STATISTICS: Table = {
    "statistics of another model": BadInput(
        PLAN.replace("{statistics}", "{other_statistics}"),
        "not for {model} (",
        "an earlier cfsp, which knew models by fewer weights, wrote them; calibrate this model",
    ),
    "statistics of another version": stale(
        "has statistics version 9, expected", facts('"version": 6', '"version": 9')
    ),
    "NaN in a sum": stale(
        "has NaN, infinite or impossible values in block 1",
        sums("units.1.sum_of_squares", lambda t: t * torch.nan),
    ),
    "a negative sum of squares": BadInput(
        "prune {model} --out {out} --repair none --sparsity 0.4 --statistics {statistics}",
        "{statistics} has NaN, infinite or impossible values in block 2",
        AGAIN,
        sums("units.2.sum_of_squares", lambda t: -t),
    ),
    "NaN in a distance": stale(
        "has NaN, infinite or impossible values in block 0",
        facts('"distance_sum": ', '"distance_sum": NaN, "x": '),
    ),
    "no tokens": stale(
        "is damaged: ValueError('block 0 has seen 0 tokens')", facts('"tokens": 128', '"tokens": 0')
    ),
    "endlessly many tokens": stale(
        "is damaged: OverflowError", facts('"tokens": 128', '"tokens": Infinity')
    ),
    "a sum too few": stale(
        "is damaged: KeyError('units.1.sum_of_squares')",
        lambda place: edit_tensors(place.statistics, lambda t: t.pop("units.1.sum_of_squares")),
    ),
    "statistics cut short": BadInput(
        PLAN,
        "{statistics} is not a statistics file",
        "cfsp calibrate MODEL",
        lambda place: place.statistics.write_bytes(place.statistics.read_bytes()[:-7]),
    ),
    "statistics that claim an endless header": BadInput(
        PLAN,
        "{statistics} is not a statistics file",
        "cfsp calibrate MODEL",
        raw("statistics", (1 << 60).to_bytes(8, "little") + b"{}"),
    ),
    "weights instead of statistics": BadInput(
        "plan {model} --statistics {model}/model.safetensors --sparsity 0.4 --out {out}",
        "{model}/model.safetensors is not a statistics file",
        "cfsp calibrate MODEL",
    ),
}

CASES: Table = {**PLANS, **STATISTICS}


@pytest.mark.parametrize("name", CASES)
def test_refused(refused: Callable[[BadInput], None], name: str) -> None:
    refused(CASES[name])
