"""Mixtures of experts: what a block of several FFNs needs besides the family contract."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import cfsp
from builders import plan_of, read_json
from cfsp.errors import PlanError, UsageError
from cfsp.planning.importance import LEAST_TOKENS
from cfsp.planning.unit_plan import UnitPlan
from ragged import tiny
from tiny_decoders import tiny_model

LONELY = 3


@pytest.fixture(scope="module")
def lonely(save):
    """A mixtral of which no token is routed to one expert of block 1."""
    model: Any = tiny("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        router = model.model.layers[1].mlp.gate.weight
        # Of a logit and its opposite one is above zero, the lonely one's is zero.
        router[1] = -router[0]
        router[LONELY] = 0.0
    return save(model)


def test_experts_that_see_few_tokens_are_told_and_scored_by_weights(lonely, few, tmp_path, caplog):
    out = tmp_path / "out"
    report = cfsp.prune(lonely, out=out, sparsity=0.4, multiple=8, **few)
    said, units = caplog.text, report.plan.units
    # Block 0 keeps all its channels, so none is chosen or repaired.
    assert [unit.kept_share < 1 for unit in units] == [False, True, True]
    alone = [
        {"block": index, "expert": expert, "tokens": seen}
        for index, unit in enumerate(cfsp.Statistics.load(out / "cfsp.statistics").units)
        for expert, seen in enumerate(unit.routed_E)
        if seen < LEAST_TOKENS and units[index].kept_share < 1
    ]
    assert units[0].few_tokens
    assert {"block": 1, "expert": LONELY, "tokens": 0} in alone
    assert report.experts_with_few_tokens == alone
    manifest = read_json(out / "cfsp.json")
    assert manifest["experts_with_few_tokens"] == alone
    assert cfsp.PruningPlan.load(out / "cfsp_plan.json").experts_with_few_tokens == alone
    assert f"{len(alone)} of 12 experts saw fewer than {LEAST_TOKENS} calibration tokens" in said
    assert f"block 1 expert {LONELY} (0)" in said

    entry = report.plan.units[1]
    before = load_file(lonely / "model.safetensors")
    name = f"model.layers.1.block_sparse_moe.experts.{LONELY}.w2.weight"
    norms_F = torch.linalg.vector_norm(before[name], dim=0)
    strongest = norms_F.topk(entry.kept_width).indices.sort().values.tolist()
    assert entry.kept_of(LONELY) == strongest
    whole, block, _ = report.repair["steps"][0]["blocks"]
    assert "few_tokens" not in whole
    told = block["few_tokens"]
    assert LONELY in told and len(told) < 4
    assert "not repaired" in said
    after = load_file(out / "model.safetensors")
    assert torch.equal(after[name], before[name][:, strongest])


@pytest.mark.parametrize(
    "asked", [{"sparsity": 0.4}, {"parts": ["ffn", "blocks"], "target_params": 0.8}]
)
def test_multiples_that_experts_cannot_have_are_refused(asked, tiny_checkpoint, few, tmp_path):
    """Before a text is read, also where it is open how many blocks go."""
    with pytest.raises(UsageError, match=r"--multiple must be a multiple of 8 .* found 4"):
        cfsp.prune(tiny_checkpoint("mixtral"), out=tmp_path / "out", multiple=4, **asked, **few)
    assert not list(tmp_path.iterdir())


def test_pruned_model_may_choose_how_its_experts_run(pruned_type):
    model: PreTrainedModel = cfsp.load(pruned_type("mixtral"))
    tokens_BT = torch.arange(2, 22)[None]
    with torch.inference_mode():
        grouped = model(input_ids=tokens_BT).logits
        model.set_experts_implementation("eager")
        assert model.config._experts_implementation == "eager"
        torch.testing.assert_close(model(input_ids=tokens_BT).logits, grouped, rtol=1e-4, atol=1e-4)


def test_a_plan_of_experts_is_read_as_written_or_refused():
    entry = UnitPlan(0, 5, (0, 4, 5, 6, 12, 13), 0.1, 0.5, ffns=3, few_tokens={2: 7})
    assert [entry.kept_of(ffn) for ffn in range(3)] == [[0, 4], [0, 1], [2, 3]]
    assert entry.kept_width == 2
    plan = plan_of(entry)
    text = plan.to_json()
    assert cfsp.PruningPlan.from_json(text) == plan
    assert plan.experts_with_few_tokens == [{"block": 0, "expert": 2, "tokens": 7}]
    for damage in ({"experts": 2}, {"experts": 0}, {"experts": "3"}, {"kept_width": 3}):
        fields = json.loads(text)
        fields["blocks"][0].update(damage)
        with pytest.raises(PlanError, match="damaged"):
            cfsp.PruningPlan.from_json(json.dumps(fields))


def test_equal_widths_leave_shared_experts_in_proportion(save, few, tmp_path):
    """One key of the config gives the width of routed experts, and of shared ones twice that."""
    source, out = save(tiny_model("deepseek_v3", n_shared_experts=2)), tmp_path / "out"
    report = cfsp.prune(source, out=out, sparsity=0.3, widths="equal", effort="fast", **few)
    assert report.intermediate_sizes == [64, 32, 64, 32, 64]
    assert "auto_map" not in read_json(out / "config.json")
