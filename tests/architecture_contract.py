"""What must hold for every architecture: architecture/test_contract.py makes a class of each."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import cfsp
from builders import draw_windows, job_of, read_json, tensors
from cfsp.architecture.activations import hidden_state, observed_activations
from cfsp.architecture.found import Unit
from cfsp.architecture.small_run import first_tensor
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import architecture_of, blocks_of
from cfsp.cut.surgery import build_pruned_model
from cfsp.planning.unit_plan import UnitPlan
from cfsp.repair.ridge import LAMBDAS
from cfsp.settings import Budget, Compute, PruneSettings
from cfsp.text.windows import Windows
from family_contract import (
    SAMPLES,
    SEQLEN,
    Case,
    assert_same,
    check_in_memory_is_the_checkpoint,
    check_masked_is_cut,
    fresh_answer,
    held_against,
    pruned_case,
    question_of,
)
from stock import Answer, Question, attention_of_layers, logits_of
from tiny_decoders import tiny_model
from tiny_models import TINY_CONFIGS, build_tiny_model

# Their FFNs are four times as wide as the hidden state, and no key of the config says otherwise.
WITHOUT_A_KEY = ("bloom", "mpt")


def build(name: str) -> PreTrainedModel:
    """Return the model of a case: a key of `TINY_CONFIGS`, or a model type."""
    return build_tiny_model(name) if name in TINY_CONFIGS else tiny_model(name)


def units_of(case: Case) -> list[tuple[Unit, UnitPlan]]:
    """Return every FFN unit, and what was decided for it."""
    units = architecture_of(case.dense.config).units
    return list(zip(units, case.report.plan.units, strict=True))


def block_of(model: PreTrainedModel, unit: Unit) -> nn.Module:
    """Return the block of a unit in one of the models."""
    return blocks_of(model, architecture_of(model.config))[unit.block]


def angular(case: Case, **asked: Any) -> dict[str, Any]:
    """Return what was asked of a case, where nothing depends on which block keeps how much."""
    # This metric needs no run of its own.
    return {**case.asked, "block_metric": "angular", "repair": "none", **asked}


def elements_of(model: nn.Module) -> int:
    """Parameters and stored buffers, tied ones once."""
    return sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())


class ArchitectureContract:
    """Inherited by every architecture; `name` is one that `build` knows."""

    name: str

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tokenizer, text_file, tmp_path_factory) -> Case:
        dense = build(cls.name)
        # torch multiplies groups of experts by eights.
        multiple = 8 if architecture_of(dense.config).has_experts else 1
        asked = {"sparsity": 0.4, "multiple": multiple, "data": [str(text_file)]}
        found = pruned_case(dense, tokenizer, tmp_path_factory.mktemp(cls.name), asked)
        assert len(set(found.report.intermediate_sizes)) > 1, "the case must have different widths"
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def stock(cls, case, forks, tmp_path_factory) -> tuple[Answer, dict[str, str]]:
        """What a fresh process without cfsp found, and what of it is held against pruning."""

        def answer(question: Question) -> Answer:
            return fresh_answer(question, forks, tmp_path_factory.mktemp("stock"))

        def of_dense() -> Mapping[str, str]:
            return answer(question_of(case.dense, case.source)).problems

        found = answer(case.question)
        return found, held_against(found.problems, of_dense)

    # What was removed is what the plan says, and nothing else.

    def test_pruned_logits_are_those_of_the_masked_original(self, case):
        check_masked_is_cut(case)

    def test_kept_channels_are_copied_bit_for_bit_and_all_else_is_untouched(self, case):
        expected = dict(case.dense.state_dict())
        prefix_of = architecture_of(case.dense.config).block_prefix
        for unit, entry in units_of(case):
            for name in unit.axes:
                full_name = prefix_of(unit.block) + name
                expected[full_name] = kept_part(unit, entry, name, expected[full_name])
        for model in (case.loaded, case.in_memory):
            assert_same(model.state_dict(), expected)
        before, after = tensors(case.source), tensors(case.out)
        changed = {name for name, tensor in before.items() if after[name].shape != tensor.shape}
        for each in (before, after):
            for name in changed:
                del each[name]
        assert_same(after, before)

    def test_original_in_memory_stays_as_it_was(self, case):
        assert_same(case.dense.state_dict(), build(self.name).state_dict())
        assert not any(p.is_meta for p in case.in_memory.parameters())

    # The shape of the result.

    def test_parameters_and_widths(self, case):
        assert elements_of(case.loaded) == case.report.parameters_after
        assert elements_of(case.dense) == case.report.parameters_before
        assert case.report.intermediate_sizes == [entry.kept_width for _, entry in units_of(case)]
        for model in (case.loaded, case.in_memory):
            for unit, entry in units_of(case):
                old, new = block_of(case.dense, unit), block_of(model, unit)
                if unit.path:
                    check_numbers(old.get_submodule(unit.path), new.get_submodule(unit.path), entry)

    def test_config_says_the_widths(self, case):
        fields = read_json(case.out / "config.json")
        assert fields["model_type"] == case.dense.config.model_type
        assert Checkpoint(case.out).architecture.widths == case.report.intermediate_sizes
        if "auto_map" not in fields:
            assert fields["architectures"] == [type(case.dense).__name__]
        else:
            assert case.question.auto_class in fields["auto_map"]

    def test_tied_embeddings_stay_tied(self, case):
        def is_tied(model: PreTrainedModel) -> bool:
            head = model.get_output_embeddings()
            return head is not None and head.weight is model.get_input_embeddings().weight

        assert is_tied(case.loaded) == is_tied(case.in_memory) == is_tied(case.dense)

    # Plain transformers and PEFT, in a process that cannot import cfsp.

    def test_fresh_process_keeps_the_contract(self, stock):
        assert not stock[1]

    def test_fresh_process_computes_what_the_in_memory_model_does(self, case, stock):
        answer, _ = stock
        logits = logits_of(case.in_memory, case.tokens_BT)
        assert torch.equal(answer.tensors["logits"], logits)
        assert answer.facts["elements"] == case.report.parameters_after
        auto_map = read_json(case.out / "config.json").get("auto_map")
        if auto_map is not None:
            assert ("hidden" in answer.tensors) == ("AutoModel" in auto_map)
        if "hidden" in answer.tensors and "base" not in answer.problems:
            with torch.inference_mode():
                base = case.in_memory.base_model(input_ids=case.tokens_BT)[0]
            assert torch.equal(answer.tensors["hidden"], base)

    def test_fresh_process_changes_every_attention(self, case, stock):
        assert not case.question.failed
        found = stock[0].facts["attention_of_layers"]
        assert found == len(attention_of_layers(case.dense)) * ["eager"]

    def test_fresh_process_adapts_every_ffn_matrix(self, case, stock):
        answer, _ = stock
        if "adapters" in answer.problems:
            return
        # A and B of rank 4 on every FFN matrix of every block.
        expected, targets = 0, []
        for name in case.question.matrices:
            *experts, rows, columns = case.in_memory.get_parameter(name).shape
            expected += 4 * (rows + columns) * (experts[0] if experts else 1)
            targets += [] if experts else [name.removesuffix(".weight")]
        if answer.facts["lora_targets"] == sorted(targets):
            assert answer.facts["lora_parameters"] == expected


class ThoroughContract(ArchitectureContract):
    """What takes longer, for one architecture of each kind; for all where time does not matter."""

    def test_in_memory_is_the_checkpoint(self, case, tmp_path):
        check_in_memory_is_the_checkpoint(case, tmp_path)

    def test_equal_widths_give_a_plain_stock_checkpoint(self, case, tmp_path):
        asked = angular(case, sparsity=0.5, multiple=16, block_metric="uniform")
        report = cfsp.prune(case.source, out=tmp_path / "uniform", **asked)
        fields = read_json(tmp_path / "uniform" / "config.json")
        is_stock = "auto_map" not in fields
        # Of several kinds of FFN it depends on whether their widths have keys of their own.
        if len({unit.path for unit, _ in units_of(case)}) == 1:
            assert set(report.intermediate_sizes) == {units_of(case)[0][0].width // 2}
            assert is_stock == (self.name not in WITHOUT_A_KEY)
        of_source = read_json(case.source / "config.json").get("per_layer_config")
        is_plain = fields.get("per_layer_config") == of_source and "ffn_widths" not in fields
        assert is_plain == is_stock
        assert bool(list((tmp_path / "uniform").glob("*.py"))) != is_stock
        reloaded = cfsp.load(tmp_path / "uniform")
        assert (type(reloaded) is type(case.dense)) == is_stock
        in_memory = build_pruned_model(LoadedModel(case.dense), report.plan, {})
        assert type(in_memory) is type(reloaded)
        assert_same(reloaded.state_dict(), in_memory.state_dict())

    def test_pruned_model_can_be_pruned_again(self, case, tmp_path):
        again = cfsp.prune(case.out, out=tmp_path / "again", **angular(case, sparsity=0.2))
        assert again.parameters_before == case.report.parameters_after
        widths = zip(case.report.intermediate_sizes, again.intermediate_sizes, strict=True)
        assert all(after <= before for before, after in widths)
        assert elements_of(cfsp.load(tmp_path / "again")) == again.parameters_after

    # Repair, whatever way round a model stores its matrices.

    def test_repaired_down_projection_is_the_ridge_solution(self, case, tokenizer, tmp_path):
        asked = angular(case, repair="ridge")
        report = cfsp.prune(case.source, out=tmp_path / "out", **asked)
        windows = draw_windows(asked["data"], tokenizer, samples=SAMPLES, seqlen=SEQLEN)
        _, seen = _observe_with_hooks(case, windows)
        after = cfsp.load(tmp_path / "out")
        repairs = report.repair["steps"][0]["blocks"]
        changed = 0
        units = architecture_of(case.dense.config).units
        for unit, entry, acts, repaired in zip(
            units, report.plan.units, seen, repairs, strict=True
        ):
            assert repaired["error_after"] <= repaired["error_before"]
            # Of several experts the report has the median, and some saw too little to be repaired.
            strengths = LAMBDAS if unit.ffns > 1 else (repaired["strength"],)
            for ffn, (act_RF, window_R) in enumerate(acts):
                # The sixth and last window is held out.
                fitted_RF = act_RF[window_R < 5].double()
                gram_FF = fitted_RF.T @ fitted_RF / max(1, len(fitted_RF))
                kept = entry.kept_of(ffn)
                mask_F = torch.zeros(entry.width, dtype=torch.bool)
                mask_F[kept] = True
                gram_KK = gram_FF[mask_F][:, mask_F]
                down_DF = down_of(block_of(case.dense, unit), unit, ffn).double()
                lost_DK = down_DF[:, ~mask_F] @ gram_FF[~mask_F][:, mask_F]
                found_DK = down_of(block_of(after, unit), unit, ffn).double()
                if torch.equal(found_DK, down_DF[:, mask_F]):
                    continue
                changed += 1
                scale_KK = gram_KK.diagonal().mean() * torch.eye(len(kept))
                solutions = [
                    down_DF[:, mask_F] + lost_DK @ torch.linalg.inv(gram_KK + strength * scale_KK)
                    for strength in strengths
                ]
                near = [torch.allclose(found_DK, each, rtol=1e-3, atol=1e-3) for each in solutions]
                assert any(near), (unit.path, unit.block, ffn)
        assert changed, "the case must repair at least one FFN"
        assert logits_of(after, case.tokens_BT).isfinite().all()

    # The engine against the model's own forward.

    def test_statistics_are_those_of_plain_hooks(self, case, tokenizer):
        windows = draw_windows(case.asked["data"], tokenizer, samples=SAMPLES, seqlen=SEQLEN)
        settings = PruneSettings(Budget(), compute=Compute("cpu", "float32", 4))
        statistics = calibrate(job_of(LoadedModel(case.dense), settings), windows)
        at_block, rows = _observe_with_hooks(case, windows)
        for unit, acts in zip(statistics.units, rows, strict=True):
            for ffn in range(unit.ffns):
                own, act_RF = unit.of_ffn(ffn), acts[ffn][0].double()
                squares_F = act_RF.square().sum(0)
                torch.testing.assert_close(own.sum_of_squares_F, squares_F, rtol=1e-5, atol=1e-6)
                assert own.tokens == len(act_RF)
        for block, (input_BTD, output_BTD) in zip(statistics.blocks, at_block, strict=True):
            cosine = nn.functional.cosine_similarity(input_BTD, output_BTD, dim=-1)
            angular = (cosine.clamp(-1, 1).double().arccos() / torch.pi).mean()
            assert block.distance == pytest.approx(angular.item(), rel=1e-5)
            assert block.tokens == windows.tokens_NT.numel()


def kept_part(unit: Unit, entry: UnitPlan, name: str, tensor: Tensor) -> Tensor:
    """Return what stays of a parameter, taken index by index."""
    axis = unit.axes[name]
    parts = []
    for ffn in range(unit.ffns):
        kept = entry.kept_of(ffn)
        places = {
            (1,): kept,
            (1, 1): kept + [unit.width + channel for channel in kept],
            (2,): [2 * channel + half for channel in kept for half in (0, 1)],
        }[axis.spans]
        one, along = (tensor[ffn], axis.axis - 1) if unit.routed else (tensor, axis.axis)
        parts.append(one[places] if along == 0 else one[:, places])
    return torch.stack(parts) if unit.routed else parts[0]


def check_numbers(old: nn.Module, new: nn.Module, entry: UnitPlan) -> None:
    """Check that every number of a module that told the width tells the new one."""
    for name, value in vars(old).items():
        if type(value) is int and value in (entry.width, 2 * entry.width):
            assert getattr(new, name) == value // entry.width * entry.kept_width, name


def down_of(block: nn.Module, unit: Unit, ffn: int) -> Tensor:
    """Return a down matrix as outputs x inputs."""
    matrix, axis = block.get_parameter(unit.down).detach(), unit.axes[unit.down].axis
    if unit.routed:
        matrix, axis = matrix[ffn], axis - 1
    return matrix if axis == 1 else matrix.T


# Rows of the input of a down projection, and which window each row is of.
Rows = tuple[Tensor, Tensor]


def _observe_with_hooks(
    case: Case, windows: Windows
) -> tuple[list[tuple[Tensor, Tensor]], list[list[Rows]]]:
    """Return input and output of each block in one stock forward, and rows of FFNs of each unit.

    That these are right is tested in architecture/test_activations.py.
    """
    architecture = architecture_of(case.dense.config)
    blocks = blocks_of(case.dense, architecture)
    at_block: list[tuple[Tensor, Tensor]] = []
    rows: list[list[Rows]] = [
        [(torch.zeros(0, unit.width), torch.zeros(0))] * unit.ffns for unit in architecture.units
    ]

    def on_block(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        at_block.append((hidden_state(args, kwargs), first_tensor(output)))

    def on_rows(number: int, _: int, ffn: int, act_RF: Tensor, token_R: Tensor) -> None:
        rows[number][ffn] = act_RF.clone(), token_R // windows.tokens_NT.shape[1]

    with ExitStack() as stack, torch.inference_mode():
        for block in blocks:
            handle = block.register_forward_hook(on_block, with_kwargs=True)
            stack.callback(handle.remove)
        for number, unit in enumerate(architecture.units):
            see = partial(on_rows, number)
            stack.enter_context(observed_activations(blocks[unit.block], [unit], see))
        # The decoder alone: some multimodal models give meanings to a few tokens.
        decoder = case.dense.get_submodule(architecture.decoder)
        decoder(input_ids=windows.tokens_NT, use_cache=False)
    return at_block, rows
