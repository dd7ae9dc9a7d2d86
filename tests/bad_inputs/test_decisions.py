"""Plans and statistics: damaged, of another version, of another model."""

from collections.abc import Callable
from typing import Any

import torch

from bad_inputs.catalogue import RECOVER, BadInput, Spoil, cut, edit_header, refusals, spoilt
from builders import edit_json, edit_tensors

ANEW, AGAIN = "make a new plan", "calibrate again"  # what to do
OBEY = "prune {model} --out {out} --repair none --plan"
PLAN = "prune {model} --sparsity 0.4 --dry-run --out {out} --statistics"


def plan(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda place: edit_json(place.plan, change)


def facts(old: str, new: str) -> Spoil:
    """Change the JSON text in the metadata of the statistics."""

    def change(header: dict[str, Any]) -> None:
        text = header["__metadata__"]["cfsp_statistics"]
        assert old in text
        header["__metadata__"]["cfsp_statistics"] = text.replace(old, new, 1)

    return lambda place: edit_header(place.statistics, change)


def sums(block: int, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    name = f"units.{block}.sum_of_squares"
    return lambda place: edit_tensors(
        place.statistics, lambda tensors: tensors.update({name: make(tensors[name])})
    )


def raw(name: str, data: bytes) -> Spoil:
    return lambda place: getattr(place, name).write_bytes(data)


PLANS = [
    BadInput(f"{OBEY} {{other_plan}}", "not for {model} (llama, ", "make a plan for this model"),
    *spoilt(
        f"{OBEY} {{plan}}",
        ANEW,
        ("plan version 7, expected 1", plan(lambda f: f.update(plan_version=7))),
        (
            "the plan's widths or experts are not those of {model}",
            plan(lambda f: f["blocks"].pop()),
        ),
        (
            "{plan} is damaged: it has '<script>' for block_metric",
            plan(lambda f: f["criterion"].update(block_metric="<script>")),
        ),
    ),
    BadInput(
        RECOVER,
        "{pruned}/cfsp_plan.json is damaged",
        ANEW,
        lambda place: edit_json(
            place.pruned / "cfsp_plan.json", lambda f: f["blocks"][0].update(importance="high")
        ),
    ),
    *spoilt(
        f"{OBEY} {{plan}}",
        "cfsp prune --dry-run",
        ("{plan} is not a pruning plan", raw("plan", b"[" * 100_000)),
        ("cannot read the plan {plan}", raw("plan", b"\xff\xfe\x00")),
    ),
    BadInput(f"{OBEY} {{pruned}}", "it is a directory, expected a file in it", "cfsp_plan.json"),
    BadInput(f"{OBEY} {{inputs}}/x", "cannot read the plan {inputs}/x", "cfsp prune --dry-run"),
]

WEIGHTS = "{model}/model.safetensors"
IMPOSSIBLE = "{statistics} has NaN, infinite or impossible values in block"
NO_STATISTICS = "{statistics} is not a statistics file"
STATISTICS = [
    BadInput(f"{PLAN} {{other_statistics}}", "not for {model} (", "calibrate this model"),
    *spoilt(
        f"{PLAN} {{statistics}}",
        AGAIN,
        ("statistics version 9, expected", facts('"version": 6', '"version": 9')),
        (f"{IMPOSSIBLE} 1", sums(1, lambda t: t * torch.nan)),
        (f"{IMPOSSIBLE} 2", sums(2, lambda t: -t)),
        (f"{IMPOSSIBLE} 0", facts('"distance_sum": ', '"distance_sum": NaN, "x": ')),
        (f"{IMPOSSIBLE} 0", facts('"tokens": 128', '"tokens": 0')),
        (f"{IMPOSSIBLE} 0", facts('"tokens": 128', '"tokens": Infinity')),
        (
            "is damaged (KeyError('units.1.sum_of_squares'))",
            lambda place: edit_tensors(place.statistics, lambda t: t.pop("units.1.sum_of_squares")),
        ),
    ),
    *spoilt(
        f"{PLAN} {{statistics}}",
        "cfsp calibrate MODEL",
        (NO_STATISTICS, lambda place: cut(place.statistics, 7)),
        (NO_STATISTICS, raw("statistics", (1 << 60).to_bytes(8, "little") + b"{}")),
    ),
    BadInput(f"{PLAN} {WEIGHTS}", f"{WEIGHTS} is not a statistics file", "cfsp calibrate MODEL"),
]

CASES = PLANS + STATISTICS

test_refused = refusals(CASES)
