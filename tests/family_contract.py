"""What must hold for every family: checkpoint/test_families.py makes a class of each tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cfsp.checkpoint.families import architecture_of, family_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import cfsp
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import blocks_of, projection_of
from cfsp.engine.compute import Engine
from cfsp.result.prune_report import PruneReport
from cfsp.text.windows import Windows, draw_windows
from forks import Forks, Job
from tiny_models import DENSE_CONFIGS, build_tiny_model

# Without repair, which changes weights: it has tests of its own.
SETTINGS: dict[str, Any] = {"samples": 6, "seqlen": 32, "repair": "none"}


@dataclass
class Case:
    """One tiny model and what pruning made of it, as a checkpoint and in memory."""

    name: str
    tokenizer: Any
    texts: list[str]
    source: Path
    dense: PreTrainedModel
    out: Path
    report: PruneReport
    in_memory: PreTrainedModel
    tokens_BT: Tensor


def logits_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens_BT).logits
    return logits


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _features(projection: Any) -> tuple[int, int]:
    """Outputs and inputs that a Linear or a Conv1D announces; PEFT goes by them."""
    if isinstance(projection, nn.Linear):
        return projection.out_features, projection.in_features
    return projection.nf, projection.nx


class FamilyContract:
    """Inherited by every family; `name` is a key of `tiny_models.TINY_CONFIGS`."""

    name: str

    @classmethod
    def multiple(cls) -> int:
        """The finest multiple of widths: torch multiplies groups of experts by eights."""
        return 1 if cls.name in DENSE_CONFIGS else 8

    @pytest.fixture(scope="class")
    @classmethod
    def case(
        cls,
        tiny_checkpoint: Callable[[str], Path],
        tokenizer: Any,
        text_file: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Case:
        source = tiny_checkpoint(cls.name)
        texts = [str(text_file)]
        out = tmp_path_factory.mktemp("pruned") / cls.name
        dense = build_tiny_model(cls.name)
        report = cfsp.prune(
            source, out=out, sparsity=0.4, multiple=cls.multiple(), data=texts, **SETTINGS
        )
        in_memory = cfsp.prune(
            dense, tokenizer, sparsity=0.4, multiple=cls.multiple(), data=texts, **SETTINGS
        )
        tokens_BT = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(3))
        assert len(set(report.intermediate_sizes)) > 1, "the case must have different widths"
        return Case(cls.name, tokenizer, texts, source, dense, out, report, in_memory, tokens_BT)

    @pytest.fixture(scope="class")
    @classmethod
    def stock(
        cls, case: Case, forks: Forks, tmp_path_factory: pytest.TempPathFactory
    ) -> dict[str, Any]:
        """What a fresh process without cfsp found: see `stock_process.py`."""
        work = tmp_path_factory.mktemp("stock")
        torch.save(case.tokens_BT, work / "tokens.pt")
        family = family_of(case.dense.config)
        paths = [family.path_in_block(matrix) for matrix in family.matrices]
        if family.experts is not None:
            paths = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        matrices = [
            f"{family.block_prefix(block)}{path}"
            for block in range(len(case.report.intermediate_sizes))
            for path in paths
        ]
        arguments = {"checkpoint": str(case.out), "directory": str(work), "matrices": matrices}
        (finished,) = forks(Job("stock_process.check", arguments))
        assert finished.status == 0, finished.stderr
        found: dict[str, Any] = json.loads((work / "found.json").read_text())
        return {**found, **torch.load(work / "tensors.pt")}

    # Nothing removed: nothing changed.

    def test_sparsity_zero_changes_no_bit(self, case: Case, tmp_path: Path) -> None:
        out = tmp_path / "same"
        cfsp.prune(case.source, out=out, sparsity=0.0, data=case.texts, **SETTINGS)
        before = load_file(case.source / "model.safetensors")
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert_bitwise_equal(after[name], tensor)
        reloaded = AutoModelForCausalLM.from_pretrained(out)
        expected = logits_of(case.dense, case.tokens_BT)
        assert_bitwise_equal(logits_of(reloaded, case.tokens_BT), expected)

        in_memory = cfsp.prune(
            case.dense, case.tokenizer, sparsity=0.0, data=case.texts, **SETTINGS
        )
        assert_bitwise_equal(logits_of(in_memory, case.tokens_BT), expected)

    # What was removed is what the plan says, and nothing else.

    def test_pruned_logits_are_those_of_the_masked_original(self, case: Case) -> None:
        expected = logits_of(_masked_original(case), case.tokens_BT)
        actual = logits_of(cfsp.load(case.out), case.tokens_BT)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        # The mask bites: the oracle would not pass for a model that was not pruned.
        dense = logits_of(case.dense, case.tokens_BT)
        assert (expected - dense).abs().max() > 1e-2

    def test_kept_rows_and_columns_are_copied_bit_for_bit(self, case: Case) -> None:
        family = family_of(case.dense.config)
        before = load_file(case.source / "model.safetensors")
        after = load_file(case.out / "model.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            layout = family.layout_of(name)
            if layout is None:
                expected = tensor
            else:
                kept = torch.tensor(case.report.plan.units[layout.unit].kept_of(layout.ffn))
                parts = tensor.chunk(layout.parts, dim=layout.axis)
                expected = torch.cat(
                    [p.index_select(layout.axis, kept) for p in parts], layout.axis
                )
            assert_bitwise_equal(after[name], expected)

    def test_original_in_memory_stays_as_it_was(self, case: Case) -> None:
        untouched = build_tiny_model(case.name)
        for name, tensor in untouched.state_dict().items():
            assert_bitwise_equal(case.dense.state_dict()[name], tensor)
        assert not any(p.is_meta for p in case.in_memory.parameters())

    # The shape of the result.

    def test_parameters_and_widths(self, case: Case) -> None:
        family = family_of(case.dense.config)
        loaded = cfsp.load(case.out)
        count = sum(p.numel() for p in loaded.parameters())
        assert count == case.report.parameters_after
        assert sum(p.numel() for p in case.dense.parameters()) == case.report.parameters_before
        for model in (loaded, case.in_memory):
            for block, width in zip(
                blocks_of(model, architecture_of(model.config)),
                case.report.intermediate_sizes,
                strict=True,
            ):
                if family.experts is not None:
                    experts, hidden = block.mlp.experts, case.dense.config.hidden_size
                    count = family.ffn_count(case.dense.config)
                    assert experts.gate_up_proj.shape == (count, 2 * width, hidden)
                    assert experts.down_proj.shape == (count, hidden, width)
                    assert experts.intermediate_dim == width
                    continue
                for name in family.matrices:
                    projection = projection_of(block, family, name)
                    outputs, inputs = family.transposed(projection.weight).shape
                    assert _features(projection) == (outputs, inputs)
                    rows = 2 * width if family.is_fused else width
                    assert (inputs == width) if name == family.down else (outputs == rows)
                    bias = projection.bias
                    assert bias is None or bias.shape == (outputs,)

    def test_config_says_the_widths(self, case: Case) -> None:
        fields = json.loads((case.out / "config.json").read_text())
        key = family_of(case.dense.config).width_key
        widths = [fields["per_layer_config"][k][key] for k in sorted(fields["per_layer_config"])]
        assert widths == case.report.intermediate_sizes
        assert fields[key] == max(widths)
        assert fields["model_type"] == case.dense.config.model_type
        assert set(fields["auto_map"]) == {"AutoModel", "AutoModelForCausalLM"}

    def test_equal_widths_give_a_plain_stock_checkpoint(self, case: Case, tmp_path: Path) -> None:
        out = tmp_path / "uniform"
        report = cfsp.prune(
            case.source, out=out, sparsity=0.5, multiple=16, data=case.texts,
            block_metric="uniform", **SETTINGS,
        )  # fmt: skip
        assert report.intermediate_sizes == [48, 48, 48]
        fields = json.loads((out / "config.json").read_text())
        assert "per_layer_config" not in fields
        assert "auto_map" not in fields
        assert not list(out.glob("*.py"))
        reloaded = AutoModelForCausalLM.from_pretrained(out)
        assert type(reloaded) is type(case.dense)
        in_memory = cfsp.prune(
            case.dense, case.tokenizer, sparsity=0.5, multiple=16, data=case.texts,
            block_metric="uniform", **SETTINGS,
        )  # fmt: skip
        assert type(in_memory) is type(case.dense)
        assert_bitwise_equal(
            logits_of(reloaded, case.tokens_BT), logits_of(in_memory, case.tokens_BT)
        )

    def test_tied_embeddings_stay_tied(self, case: Case) -> None:
        tied = case.dense.config.tie_word_embeddings
        for model in (cfsp.load(case.out), case.in_memory):
            same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert same == tied
        stored = load_file(case.out / "model.safetensors").keys()
        assert bool({"lm_head.weight", "embed_out.weight"} & stored) != tied

    def test_tokenizer_and_generation_config_travel(self, case: Case) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (case.out / name).read_bytes() == (case.source / name).read_bytes(), name
        template = case.source / "chat_template.jinja"
        assert (case.out / template.name).read_bytes() == template.read_bytes()

    def test_pruned_model_can_be_pruned_again(self, case: Case, tmp_path: Path) -> None:
        again = cfsp.prune(
            case.out,
            out=tmp_path / "again",
            sparsity=0.2,
            multiple=self.multiple(),
            data=case.texts,
            **SETTINGS,
        )
        assert again.parameters_before == case.report.parameters_after
        widths = zip(case.report.intermediate_sizes, again.intermediate_sizes, strict=True)
        assert all(after <= before for before, after in widths)
        model = cfsp.load(tmp_path / "again")
        assert sum(p.numel() for p in model.parameters()) == again.parameters_after

    def test_in_memory_model_is_saved_and_reloaded(self, case: Case, tmp_path: Path) -> None:
        case.in_memory.save_pretrained(tmp_path / "saved")
        expected = logits_of(case.in_memory, case.tokens_BT)
        assert_bitwise_equal(logits_of(cfsp.load(tmp_path / "saved"), case.tokens_BT), expected)
        assert sorted(Checkpoint(tmp_path / "saved").specs) == sorted(Checkpoint(case.out).specs)

    # Plain transformers and PEFT, in a process that cannot import cfsp.

    def test_fresh_process_gives_the_logits_of_the_in_memory_model(
        self, case: Case, stock: dict[str, Any]
    ) -> None:
        assert_bitwise_equal(stock["logits"], logits_of(case.in_memory, case.tokens_BT))
        assert stock["parameters"] == case.report.parameters_after

    def test_fresh_process_loads_the_base_model_alone(
        self, case: Case, stock: dict[str, Any]
    ) -> None:
        with torch.inference_mode():
            base = case.in_memory.base_model(input_ids=case.tokens_BT).last_hidden_state
        assert_bitwise_equal(stock["hidden"], base)

    def test_fresh_process_generates_with_its_cache(
        self, case: Case, stock: dict[str, Any]
    ) -> None:
        """Greedy decoding with a cache picks the tokens that full forward passes pick."""
        tokens_BT = case.tokens_BT[:, :8]
        for _ in range(stock["new_tokens"]):
            next_B1 = logits_of(case.in_memory, tokens_BT)[:, -1:].argmax(-1)
            tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
        assert_bitwise_equal(stock["generated"], tokens_BT)

    def test_fresh_process_changes_the_attention_implementation(
        self, case: Case, stock: dict[str, Any]
    ) -> None:
        assert set(stock["attention_of_layers"]) == {"eager"}
        # Not those of before: some families leave out parts of their attention in SDPA.
        masked = _masked_original(case)
        masked.set_attn_implementation("eager")
        expected = logits_of(masked, case.tokens_BT)
        torch.testing.assert_close(stock["eager_logits"], expected, rtol=1e-5, atol=1e-5)

    def test_fresh_process_saves_and_reloads(self, stock: dict[str, Any]) -> None:
        assert_bitwise_equal(stock["resaved_logits"], stock["logits"])

    def test_fresh_process_trains_lora(self, case: Case, stock: dict[str, Any]) -> None:
        assert stock["lora_loss_after"] < stock["lora_loss_before"]
        # A and B of rank 4 on every FFN matrix of every block.
        family = family_of(case.dense.config)
        hidden = case.dense.config.hidden_size
        fused = family.is_fused or family.experts is not None
        expected = sum(
            4 * family.ffn_count(case.dense.config) * (hidden + rows)
            for width in case.report.intermediate_sizes
            for rows in ([2 * width] if fused else [width] * (len(family.matrices) - 1)) + [width]
        )
        assert stock["lora_parameters"] == expected

    # Repair, whatever way round a family stores its matrices.

    def test_repaired_down_projection_is_the_ridge_solution(
        self, case: Case, tmp_path: Path
    ) -> None:
        settings = {**SETTINGS, "repair": "ridge"}
        report = cfsp.prune(
            case.source,
            out=tmp_path / "out",
            sparsity=0.4,
            multiple=self.multiple(),
            data=case.texts,
            **settings,
        )
        family = family_of(case.dense.config)
        windows = draw_windows(case.texts, case.tokenizer, samples=6, seqlen=32)
        seen = _observe_with_hooks(case.dense, windows)
        before = load_file(case.source / "model.safetensors")
        after = load_file(tmp_path / "out" / "model.safetensors")
        entries = zip(report.repair["steps"][0]["blocks"], report.plan.units, seen, strict=True)
        changed = 0
        for block, (repaired, entry, (_, _, acts)) in enumerate(entries):
            assert repaired["error_after"] <= repaired["error_before"]
            for ffn, repair in enumerate(repaired.get("experts", [repaired])):
                if repair["strength"] is None:
                    continue
                changed += 1
                # The sixth and last window is held out.
                act_RF, window_R = acts[ffn]
                fitted_RF = act_RF[window_R < 5].double()
                gram_FF = fitted_RF.T @ fitted_RF / len(fitted_RF)
                kept = entry.kept_of(ffn)
                mask_F = torch.zeros(entry.width, dtype=torch.bool)
                mask_F[kept] = True
                gram_KK = gram_FF[mask_F][:, mask_F]
                ridge_KK = repair["strength"] * gram_KK.diagonal().mean() * torch.eye(len(kept))
                name = family.weight_name(block, family.down, ffn)
                down_DF = family.transposed(before[name]).double()
                lost_DK = down_DF[:, ~mask_F] @ gram_FF[~mask_F][:, mask_F]
                expected_DK = down_DF[:, mask_F] + lost_DK @ torch.linalg.inv(gram_KK + ridge_KK)
                torch.testing.assert_close(
                    family.transposed(after[name]).double(), expected_DK, rtol=1e-3, atol=1e-3
                )
        assert changed, "the case must repair at least one block"
        assert logits_of(cfsp.load(tmp_path / "out"), case.tokens_BT).isfinite().all()

    # The engine against the model's own forward.

    @pytest.mark.parametrize("batch_windows", [1, 4, None])
    def test_statistics_are_those_of_plain_hooks(
        self, case: Case, batch_windows: int | None
    ) -> None:
        windows = draw_windows(case.texts, case.tokenizer, samples=6, seqlen=32)
        statistics = calibrate(
            LoadedModel(case.dense),
            windows,
            Engine(torch.device("cpu"), torch.float32, batch_windows),
        )
        seen = _observe_with_hooks(case.dense, windows)
        for block, unit, (input_BTD, output_BTD, acts) in zip(
            statistics.blocks, statistics.units, seen, strict=True
        ):
            assert unit.ffns == len(acts)
            for ffn, (act_RF, _) in enumerate(acts):
                own, act = unit.of_ffn(ffn), act_RF.double()
                # Terms of both signs cancel: the error is relative to what was added up.
                assert ((own.sum_F - act.sum(0)).abs() <= 1e-5 * act.abs().sum(0)).all()
                torch.testing.assert_close(
                    own.sum_of_squares_F, act.square().sum(0), rtol=1e-5, atol=1e-6
                )
                assert own.tokens == len(act)
            cosine = nn.functional.cosine_similarity(input_BTD, output_BTD, dim=-1)
            angular = (cosine.clamp(-1, 1).double().arccos() / torch.pi).mean()
            assert block.distances["angular"] == pytest.approx(angular.item(), rel=1e-5)
            assert block.tokens == windows.tokens_NT.numel()


def _masked_original(case: Case) -> PreTrainedModel:
    """The stock model, with the weights that removed channels go out by set to zero."""
    masked = build_tiny_model(case.name)
    family = family_of(masked.config)
    with torch.no_grad():
        blocks = blocks_of(masked, architecture_of(masked.config))
        for block, entry in zip(blocks, case.report.plan.units, strict=True):
            for ffn in range(entry.ffns):
                mask_F = torch.zeros(entry.width)
                mask_F[entry.kept_of(ffn)] = 1.0
                if family.experts is not None:
                    block.mlp.experts.down_proj[ffn].mul_(mask_F)
                    continue
                down = projection_of(block, family, family.down)
                down.weight.mul_(mask_F[:, None] if family.inputs_first else mask_F)
    return masked


# Rows of the input of a down projection, and which window each row is of.
Rows = tuple[Tensor, Tensor]


def _observe_with_hooks(
    model: PreTrainedModel, windows: Windows
) -> list[tuple[Tensor, Tensor, list[Rows]]]:
    """Return each block's input, output and FFN activations, from one stock forward."""
    family = family_of(model.config)
    blocks = blocks_of(model, architecture_of(model.config))
    seqlen = windows.tokens_NT.shape[1]
    seen: list[dict[str, Any]] = [{} for _ in blocks]
    handles = []
    for index, block in enumerate(blocks):

        def on_block(
            module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index
        ) -> None:
            seen[index]["input"] = args[0] if args else kwargs["hidden_states"]
            seen[index]["output"] = output[0] if isinstance(output, tuple) else output

        def on_down(module: nn.Module, args: Any, index: int = index) -> None:
            act_RF = args[0].flatten(0, -2)
            seen[index]["acts"] = [(act_RF, torch.arange(len(act_RF)) // seqlen)]

        def on_experts(module: Any, args: Any, index: int = index) -> None:
            seen[index]["acts"] = _rows_of_experts(module, *args, seqlen=seqlen)

        handles.append(block.register_forward_hook(on_block, with_kwargs=True))
        if family.experts is not None:
            handles.append(block.mlp.experts.register_forward_pre_hook(on_experts))
        else:
            down = projection_of(block, family, family.down)
            handles.append(down.register_forward_pre_hook(on_down))
    logits_of(model, windows.tokens_NT)
    for handle in handles:
        handle.remove()
    return [(s["input"], s["output"], s["acts"]) for s in seen]


def _rows_of_experts(
    experts: Any, hidden_RD: Tensor, expert_RK: Tensor, share_RK: Tensor, *, seqlen: int
) -> list[Rows]:
    """What each expert's down projection gets, token by token, times the router's share."""
    rows: list[list[Tensor]] = [[] for _ in experts.gate_up_proj]
    windows: list[list[int]] = [[] for _ in experts.gate_up_proj]
    for token, hidden_D in enumerate(hidden_RD):
        for expert, share in zip(expert_RK[token].tolist(), share_RK[token], strict=True):
            gate_F, up_F = (experts.gate_up_proj[expert] @ hidden_D).chunk(2)
            rows[expert].append(share * nn.functional.silu(gate_F) * up_F)
            windows[expert].append(token // seqlen)
    return [
        (torch.stack(row), torch.tensor(window)) for row, window in zip(rows, windows, strict=True)
    ]
