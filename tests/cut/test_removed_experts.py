"""Whole experts: by which scores they go, how many can, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cfsp
from builders import edit_json, edit_tensors, plan_of, read_json
from cfsp.architecture import expert_proof
from cfsp.architecture.activations import observed_activations
from cfsp.architecture.expert_proof import masked_experts
from cfsp.architecture.proof import prove, small_run_of
from cfsp.architecture.small_run import FailedCheckError
from cfsp.calibration.calibrate import UnitSums
from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.errors import BudgetError, StatisticsError, UnsupportedModelError
from cfsp.planning.importance import expert_scores, lost_output, strongest_experts, warn_of_experts
from cfsp.planning.unit_plan import UnitPlan
from cfsp.selection.constraint import Parameters, Share
from cfsp.settings import Budget, Part
from tiny_decoders import tiny_config, tiny_model

PARTS: tuple[Part, ...] = ("experts",)
# Of experts, of which some are chosen first.
GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}


def test_scores_are_those_of_the_published_formula():
    """REAP in NumPy, on the experts and the router of a block of Mixtral."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    block, generator = model.model.layers[0], torch.Generator().manual_seed(1)
    hidden_RD = torch.randn(40, model.config.hidden_size, generator=generator)
    source = LoadedModel(model, PARTS)
    (unit,) = source.units
    outputs = UnitSums(unit.ffns, unit.ffns)

    def add(_unit: int, expert: int, added_RD: Tensor, _token_R: Tensor) -> None:
        outputs.add_output(expert, added_RD)

    with torch.no_grad(), observed_activations(block, [unit], lambda *_: None, add):
        # The pre-hook of the block is what tells how many tokens there are.
        for hook in block._forward_pre_hooks.values():
            hook(block, (hidden_RD[None],), {})
        block.mlp(hidden_RD[None])
    router_ED, up_EFD, down_EDF = (
        tensor.detach().numpy()
        for tensor in (
            block.mlp.gate.weight, block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
        )
    )  # fmt: skip
    sum_E, count_E = np.zeros(unit.ffns), np.zeros(unit.ffns)
    for token_D in hidden_RD.numpy():
        weight_E = np.exp(router_ED @ token_D)
        chosen = np.argsort(-weight_E)[:2]
        for expert in chosen:
            gate_F, up_F = np.split(up_EFD[expert] @ token_D, 2)
            output_D = down_EDF[expert] @ (gate_F / (1 + np.exp(-gate_F)) * up_F)
            sum_E[expert] += weight_E[expert] / weight_E[chosen].sum() * np.linalg.norm(output_D)
            count_E[expert] += 1
    seen = tuple(int(count) for count in count_E)
    zeros = torch.zeros(unit.ffns * unit.width, dtype=torch.float64)
    statistics = UnitStatistics(0, zeros, 40, seen, output_norm_E=outputs.output_norm_E)
    expected_E = sum_E / np.maximum(count_E, 1)
    np.testing.assert_allclose(expert_scores(statistics).numpy(), expected_E, rtol=1e-5)


def test_an_expert_without_tokens_scores_nothing():
    zeros = torch.zeros(12, dtype=torch.float64)
    norms = torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64)
    statistics = UnitStatistics(0, zeros, 10, (2, 0, 3), output_norm_E=norms)
    assert expert_scores(statistics).tolist() == [2.0, 0.0, 3.0]
    assert lost_output(statistics, [2]) == pytest.approx(4 / 13)


def test_equal_scores_and_groups():
    assert strongest_experts(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2) == [0, 1]
    score_E = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert strongest_experts(score_E, 4) == [0, 1, 2, 3]
    assert strongest_experts(score_E, 4, groups=2) == [0, 1, 6, 7]
    assert strongest_experts(score_E, 4, groups=4) == [0, 2, 5, 7]


def test_what_a_router_needs_stays(save):
    source = Checkpoint(save(tiny_model("mixtral")), parts=PARTS)
    with pytest.raises(BudgetError, match=r"needs 2; between 0 and 2 can be removed \(50.0%\)"):
        Share(source, Budget(0.8, parts=PARTS)).check()
    for removed in (0, 1, 2):
        assert Share(source, Budget(parts=PARTS, remove=removed)).experts() == removed
    assert Share(source, Budget(0.3, parts=PARTS)).experts() == 1
    # 2 of 4 experts are 55,296 of 150,112 parameters with their rows of the router.
    assert Parameters(source, Budget(parts=PARTS), 0.63).experts() == 2
    assert Parameters(source, Budget(parts=PARTS), 0.8).experts() == 1
    grouped = Checkpoint(save(tiny_model("deepseek_v3", **GROUPS)), parts=PARTS)
    assert grouped.architecture.experts is not None
    assert grouped.architecture.experts.groups == 2
    assert Share(grouped, Budget(0.3, parts=PARTS)).experts() == 2
    for removed in (1, 3):
        with pytest.raises(BudgetError, match=rf"remove {removed} of 8 .* run with {8 - removed}"):
            Share(grouped, Budget(parts=PARTS, remove=removed)).experts()
    with pytest.raises(BudgetError, match=r"cannot remove 9 of 4 .* needs 2"):
        Share(source, Budget(parts=PARTS, remove=9)).experts()


def test_a_fault_in_one_of_many_blocks_is_found(monkeypatch):
    """Rounding may add up over all blocks; a block that computes something else may not."""
    architecture = prove(tiny_config("mixtral", num_hidden_layers=12), parts=("experts",))
    run = small_run_of(tiny_config("mixtral", num_hidden_layers=12))
    kept = dict.fromkeys(range(12), (0, 2))
    expert_proof.check_experts(architecture, run, kept)
    original = expert_proof._cut

    def faulty(*arguments: Any) -> Any:
        smaller = original(*arguments)
        gate = smaller.blocks[7].mlp.gate
        gate.weight = torch.nn.Parameter(gate.weight * 1.001, requires_grad=False)
        return smaller

    monkeypatch.setattr(expert_proof, "_cut", faulty)
    with pytest.raises(FailedCheckError, match=r"cut: expected .* in block 7"):
        expert_proof.check_experts(architecture, run, kept)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "hy_v4"])
def test_masked_experts_are_never_chosen(name):
    """Two compute in the dtype of their weight; one of these has several residual streams."""
    model = tiny_model(name).to(torch.bfloat16)
    units = prove(model.config, parts=PARTS).units
    unit = next(each for each in units if each.expert_axes)
    block, chosen = model.model.layers[unit.block], list[Tensor]()
    kept = list(range(unit.ffns // 2, unit.ffns))
    experts = block.get_submodule(unit.path)
    with (
        experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1])),
        masked_experts(block, unit, kept),
        torch.inference_mode(),
    ):
        model(input_ids=torch.arange(3, 35)[None])
    assert set(chosen[0].flatten().tolist()) == set(kept)


def test_experts_that_few_tokens_reached_are_told(caplog):
    """Whole experts go by scores that are then noisy."""
    kept = tuple(range(8)) + tuple(range(16, 24))
    unit = UnitPlan(0, 8, kept, 0.1, 0.5, ffns=3, few_tokens={1: 3, 2: 9})
    warn_of_experts(plan_of(unit))
    assert (
        "2 of 3 experts saw fewer than 32 calibration tokens, so whether they go is decided by "
        "noisy scores: block 0 expert 1 (3), block 0 expert 2 (9); give more --samples"
    ) in caplog.text
    caplog.clear()
    warn_of_experts(plan_of(replace(unit, kept=(0, 1, 16, 17))))
    assert "noisy scores, and their channels are chosen by their weights alone" in caplog.text


def test_one_plan_after_the_other_from_the_same_statistics(tiny_checkpoint, few, tmp_path):
    mixtral = tiny_checkpoint("mixtral")
    statistics = cfsp.calibrate(mixtral, parts="experts", **few)
    statistics.save(tmp_path / "statistics")
    again = cfsp.Statistics.load(tmp_path / "statistics")
    for removed in (1, 2):
        plan = cfsp.plan(mixtral, again, parts=PARTS, remove=removed)
        assert plan.kept_experts == 4 - removed
    by_channels = cfsp.calibrate(mixtral, **few)
    with pytest.raises(StatisticsError, match="calibrate with the same --parts"):
        cfsp.plan(mixtral, by_channels, sparsity=0.5, parts=PARTS)


REFUSED = {
    "no experts": ("llama", {}, "it has no routed experts"),
    "only one": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}, "have one routed"),
    "as few as are chosen": ("mixtral", {"num_local_experts": 2}, "it runs with 1 experts"),
    # Their router chooses among groups by the two best of each.
    "groups of two": ("deepseek_v3", {**GROUPS, "n_group": 4, "topk_group": 2}, "it runs with 7"),
    "by a table of tokens": ("deepseek_v4", {}, "failed the check cut: .* with masked experts"),
    "unseen tokens": ("jetmoe", {}, "does not tell which tokens its experts are given"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_refused_by_name(name):
    model_type, values, expected = REFUSED[name]
    config = tiny_config(model_type, **values)
    with pytest.raises(UnsupportedModelError, match=expected):
        prove(config, parts=PARTS)


def test_a_config_keeps_the_name_that_it_has_for_the_number(save, few, tmp_path):
    """Published Qwen3 has `num_experts`, which transformers now calls `num_local_experts`."""
    source, out = save(tiny_model("qwen3_moe", num_experts=6)), tmp_path / "out"
    old, new = "num_experts", "num_local_experts"
    edit_json(source / "config.json", lambda fields: fields.update({old: fields.pop(new)}))
    cfsp.prune(source, out=out, parts=PARTS, sparsity=0.5, **few)
    written = read_json(out / "config.json")
    assert written[old] == 3
    assert new not in written
    Checkpoint(out)


@pytest.mark.parametrize("parts", ["experts", "ffn"])
def test_a_config_that_no_longer_describes_further_tokens_is_told(
    parts, save, few, tmp_path, caplog
):
    """They are built by its numbers, of which widths by block are none."""
    source = save(tiny_model("deepseek_v3"))
    extra = {"model.layers.61.eh_proj.weight": torch.ones(4, 2)}
    edit_tensors(source / "model.safetensors", lambda found: found.update(extra))
    asked = {**few, "sparsity": 0.5, "multiple": 8, "effort": "fast"}
    cfsp.prune(source, out=tmp_path / "out", parts=parts, **asked)
    told = "describes the layers of multi-token prediction (model.layers.61.eh_proj.weight and"
    assert (told in caplog.text) == (parts == "experts")
