"""The plan: round trip, refusal of damaged and foreign ones."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import CALIBRATION, CRITERION
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import PlanError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from tiny_models import build_tiny_model


@st.composite
def units(draw: st.DrawFn) -> tuple[UnitPlan, ...]:
    """One in every block; or none to two in a block, which have paths."""
    if draw(st.booleans()):
        return tuple(draw(unit(block=block)) for block in range(draw(st.integers(1, 6))))
    paths = st.sampled_from([("mlp",), ("mlp.experts", "mlp.shared_expert"), ()])
    found = [
        draw(unit(block=block, path=path))
        for block in range(draw(st.integers(1, 6)))
        for path in draw(paths)
    ]
    return tuple(found) or (draw(unit(block=3, path="mlp")),)


@st.composite
def unit(draw: st.DrawFn, block: int, path: str = "") -> UnitPlan:
    width = draw(st.integers(1, 100))
    kept = draw(st.sets(st.integers(0, width - 1), min_size=1))
    distance, importance = (draw(st.floats(0, 1, allow_nan=False)) for _ in range(2))
    cost = draw(st.integers(1, 128)) if path else 1
    return UnitPlan(block, width, tuple(sorted(kept)), distance, importance, path=path, cost=cost)


plans = st.builds(
    PruningPlan,
    model=st.builds(ModelIdentity, st.text(), st.just("llama"), st.just("a" * 32)),
    criterion=st.just(CRITERION),
    calibration=st.just(CALIBRATION),
    units=units(),
)


@given(plans)
@settings(max_examples=40)
def test_round_trip(plan):
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert plan.kept_widths == [len(unit.kept) for unit in plan.units]
    removed = sum(unit.cost * (unit.width - len(unit.kept)) for unit in plan.units)
    total = sum(unit.cost * unit.width for unit in plan.units)
    assert plan.ffn_sparsity == pytest.approx(removed / total)


def test_plan_of_a_large_model_stays_small():
    wide = (UnitPlan(i, 18944, tuple(range(0, 18944, 2)), 0.1, 0.5) for i in range(80))
    plan = PruningPlan(ModelIdentity("m", "llama", "a"), {}, {}, tuple(wide))
    assert len(plan.to_json()) < 1_000_000


@pytest.fixture(scope="module")
def plan(pruned) -> PruningPlan:
    """Of the tiny Llama."""
    return PruningPlan.load(f"{pruned}/cfsp_plan.json")


def damaged(plan: PruningPlan, change: Callable[[dict[str, Any]], object]) -> str:
    fields = json.loads(plan.to_json())
    change(fields)
    return json.dumps(fields)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda f: f.update(plan_version=99), "version 99, expected"),
    "no blocks": (lambda f: f.pop("blocks"), "blocks"),
    "blocks are text": (lambda f: f.update(blocks="abc"), "damaged"),
    "no model": (lambda f: f.pop("model"), "model"),
    "foreign model field": (lambda f: f["model"].update(colour="red"), "colour"),
    "width zero": (lambda f: f["blocks"][1].update(width=0), "width 0"),
    "width text": (lambda f: f["blocks"][1].update(width="96"), "width 96"),
    "huge width": (lambda f: f["blocks"][1].update(width=1 << 40), "impossible width"),
    "narrower than its mask": (lambda f: f["blocks"][1].update(width=40), "width of 40"),
    "wider than its mask": (lambda f: f["blocks"][1].update(width=1000), "width of 1000"),
    "not base64": (lambda f: f["blocks"][0].update(kept="?!"), "base64"),
    "kept is a number": (lambda f: f["blocks"][0].update(kept=7), "damaged"),
    "nothing kept": (lambda f: f["blocks"][0].update(kept="AAAAAAAAAAAAAAAA"), "0 channels"),
    "another count": (lambda f: f["blocks"][0].update(kept_width=3), "3 are announced"),
    "distance is text": (lambda f: f["blocks"][0].update(distance="far"), "far"),
    "distance is nan": (lambda f: f["blocks"][0].update(distance=float("nan")), "distance nan"),
    "channels as a list": (lambda f: f["blocks"][0].update(kept=[5, 3, 3]), "damaged"),
    "a block before the first": (lambda f: f["blocks"][0].update(block=-1), "damaged"),
    "a later block first": (lambda f: f["blocks"][0].update(block=2), "damaged"),
    "a path with a bar": (lambda f: f["blocks"][0].update(path="a|b"), "damaged"),
    "no cost": (lambda f: f["blocks"][0].update(cost=0), "damaged"),
    "no windows": (lambda f: f["calibration"].pop("windows"), "'windows'"),
    "no multiple": (lambda f: f["criterion"].pop("multiple"), "'multiple'"),
    "half": (lambda f: f["criterion"].update(sparsity="half"), "'half' for sparsity"),
    "parts are a number": (lambda f: f["criterion"].update(parts=5), "5 for parts"),
    "parts are null": (lambda f: f["criterion"].update(parts=None), "None for parts"),
    "no such part": (lambda f: f["criterion"].update(parts=[[]]), "[[]] for parts"),
    "of nothing known": (lambda f: f["criterion"].update(of="words"), "'words' for of"),
    "removal is a list": (lambda f: f["criterion"].update(removal=[1]), "[1] for removal"),
    "describes nothing": (lambda f: f.update(blocks=[]), "describes no block"),
    "fingerprint": (lambda f: f["model"].update(fingerprint=[1]), "must be text"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_plan_is_refused(plan, kind):
    change, expected = DAMAGE[kind]
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(damaged(plan, change), "plan.json")
    assert "plan.json" in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", "null", '"plan"', "{ not json"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="is not a pruning plan"):
        PruningPlan.from_json(text)


def test_plan_fits_its_model_and_refuses_another(plan, tiny_checkpoint, tmp_path):
    plan.check_fits(Checkpoint(tiny_checkpoint("llama")))
    with pytest.raises(PlanError, match=r"made for .* \(llama, .*not for .* \(qwen3, "):
        plan.check_fits(Checkpoint(tiny_checkpoint("qwen3")))
    # The same shapes with other weights, as of a fine-tuned copy.
    build_tiny_model("llama", seed=7).save_pretrained(tmp_path / "tuned")
    with pytest.raises(PlanError, match="make a plan for this model"):
        plan.check_fits(Checkpoint(tmp_path / "tuned"))


def test_upcast_copy_is_the_same_model(tmp_path):
    """A plan for a bfloat16 model fits its float32 copy, and the other way round."""
    narrow = build_tiny_model("llama", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    narrow.float().save_pretrained(tmp_path / "wide")
    identities = [ModelIdentity.of(Checkpoint(tmp_path / n)) for n in ("narrow", "wide")]
    assert identities[0].fingerprint == identities[1].fingerprint
