"""Whole blocks go: skipped is cut, and the checkpoint is a stock one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

import cfsp
from builders import plan_without
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.proof import small_run_of
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.checkpoint.tensor_file import TensorFile
from cfsp.cut.in_memory import build_pruned_model
from cfsp.engine.block_proof import check_blocks_can_go, prove_without_blocks
from cfsp.engine.call_form import find_call_form
from cfsp.engine.resumed_forward import skipped
from cfsp.errors import UnsupportedModelError
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.candidate import Dropped
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Budget, PruneSettings
from family_contract import matrices_of, save_with_tokenizer, tokens_of_question
from forks import Forks, Job
from stock import Question, generated
from tiny_decoders import random_model, tiny_config


@dataclass(frozen=True)
class Case:
    """A model and the blocks that go; what its config says of the others."""

    config: Callable[[], PreTrainedConfig]
    removed: tuple[int, ...]
    said: dict[str, Any]


_SLIDING, _FULL = "sliding_attention", "full_attention"
CASES = {
    "llama": Case(
        lambda: tiny_config("llama", num_hidden_layers=5), (0, 3), {"num_hidden_layers": 3}
    ),
    "gpt2": Case(lambda: tiny_config("gpt2", n_layer=4), (1,), {"n_layer": 3}),
    "gemma3_text": Case(
        lambda: tiny_config(
            "gemma3_text",
            num_hidden_layers=5,
            layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL],
        ),
        (0, 2),
        {"num_hidden_layers": 3, "layer_types": [_SLIDING, _SLIDING, _FULL]},
    ),
    "smollm3": Case(
        lambda: tiny_config("smollm3", num_hidden_layers=5, no_rope_layers=[1, 0, 1, 1, 0]),
        (0, 2),
        {"no_rope_layers": [0, 1, 0]},
    ),
    "deepseek_v3": Case(
        lambda: tiny_config("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=2),
        (1, 3),
        {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    ),
    "qwen2_moe": Case(
        lambda: tiny_config("qwen2_moe", num_hidden_layers=5, mlp_only_layers=[0, 3]),
        (1, 2),
        {"mlp_only_layers": [0, 1]},
    ),
    "mixtral": Case(
        lambda: tiny_config("mixtral", num_hidden_layers=3), (0,), {"num_hidden_layers": 2}
    ),
    "qwen3_next": Case(
        lambda: tiny_config(
            "qwen3_next",
            num_hidden_layers=4,
            layer_types=["linear_attention", _FULL, "linear_attention", _FULL],
        ),
        (0, 3),
        {"layer_types": [_FULL, "linear_attention"]},
    ),
}


def expected_of(dense: PreTrainedModel, plan: PruningPlan) -> torch.Tensor:
    """Return the logits of the dense model with the plan's blocks skipped."""
    source = LoadedModel(dense)
    blocks = blocks_of(dense, source.architecture)

    def logits(tokens_BT: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = dense(input_ids=tokens_BT, use_cache=False).logits
        return found

    with torch.inference_mode():
        form = find_call_form(logits, blocks, dense.device)
        with skipped(blocks, plan.removed_blocks, form):
            return logits(tokens_of_question())


@pytest.mark.parametrize("name", CASES)
def test_skipped_is_cut_in_files_and_in_memory_and_for_stock_software(
    forks: Forks, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    case, out = CASES[name], tmp_path / "out"
    dense = random_model(model_class_of(case.config()), case.config())
    save_with_tokenizer(dense, tokenizer, tmp_path / "dense")
    source = Checkpoint(tmp_path / "dense")
    plan = plan_without(source, Dropped(case.removed))
    settings = PruneSettings(Budget(0.0, parts=("blocks",)), repair="none")
    report = prune_checkpoint(source, out, settings, plan=plan)
    expected = expected_of(dense, plan)
    eager = copy.deepcopy(dense)
    eager.set_attn_implementation("eager")

    config = json.loads((out / "config.json").read_text())
    for key, value in case.said.items():
        assert config[key] == value, key
    assert config["architectures"] == [type(dense).__name__]
    assert not {"auto_map", "per_layer_config", "ffn_widths"} & config.keys()
    assert not list(out.glob("*.py"))
    pruned = Checkpoint(out)
    staying = source.architecture.block_count - len(case.removed)
    assert pruned.architecture.block_count == staying
    pruned.stored.check_complete("the pruned model")
    assert report.parameters_after == sum(spec.elements for spec in pruned.specs.values())

    in_memory = build_pruned_model(dense, LoadedModel(dense), plan, {})
    with torch.inference_mode():
        found = in_memory(input_ids=tokens_of_question()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for key, tensor in cfsp.load(out).state_dict().items():
        assert torch.equal(tensor, in_memory.state_dict()[key]), key

    with torch.inference_mode():
        prompt = tokens_of_question()[:, :8]
        without_cache = in_memory.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            use_cache=False,
        )
    assert torch.equal(generated(in_memory, tokens_of_question()), without_cache)
    question = Question(
        checkpoint=str(out),
        auto_class="AutoModelForCausalLM",
        class_name=type(dense).__name__,
        tokens_BT=tokens_of_question(),
        expected={
            "logits": expected,
            "generated": without_cache,
            "eager_logits": expected_of(eager, plan),
        },
        failed={},
        matrices=matrices_of(pruned.architecture),
    )
    question.save(tmp_path / "question.pt")
    (finished,) = forks(Job("stock.check", {"directory": str(tmp_path)}))
    assert finished.status == 0, finished.stderr
    assert torch.load(tmp_path / "answer.pt")["problems"] == {}


def test_blocks_and_channels_go_together(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "parts": "blocks,ffn", "goal": cfsp.TargetParameters(0.65), "multiple": 8,
        "data": [text_file], "samples": 4, "seqlen": 32, "device": "cpu",
    }  # fmt: skip
    source = tiny_checkpoint("llama")
    report = cfsp.prune(source, out=tmp_path / "out", **asked)
    plan = PruningPlan.load(tmp_path / "out" / "cfsp_plan.json")
    assert plan == report.plan
    assert len(plan.removed_blocks) + len(report.intermediate_sizes) == 3
    assert plan.removed_blocks and 0 < plan.criterion["sparsity"] < 1
    kept, whole = sum(report.intermediate_sizes), sum(unit.width for unit in plan.kept_units)
    assert kept == pytest.approx((1 - plan.criterion["sparsity"]) * whole, abs=8)
    assert [not unit.kept for unit in plan.units] == [
        unit.block in plan.removed_blocks for unit in plan.units
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    again = cfsp.prune(cfsp.load(source), tokenizer, **asked)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key

    # By its plan, in a run of its own.
    settings = PruneSettings(Budget(0.0), repair="none")
    prune_checkpoint(Checkpoint(source), tmp_path / "obeyed", settings, plan=plan)
    assert Checkpoint(tmp_path / "obeyed").architecture.widths == report.intermediate_sizes


def test_nothing_removed_is_the_model(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("gemma3_text"), tmp_path / "out"
    cfsp.prune(
        source, out=out, parts="blocks", sparsity=0.0, data=[text_file], samples=4, seqlen=32,
        device="cpu",
    )  # fmt: skip
    before, after = (TensorFile(place / "model.safetensors") for place in (source, out))
    assert before.specs == after.specs
    for name in before.specs:
        assert torch.equal(before.read(name), after.read(name))
    assert json.loads((out / "cfsp_plan.json").read_text())["plan_version"] == 1


@pytest.mark.parametrize(
    ("config", "removed", "message"),
    [
        (
            lambda: tiny_config("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2),
            (1,),
            r"block 1 of qwen2_moe can't be removed: .* by a rule \(decoder_sparse_step=2\)",
        ),
        (
            lambda: GPT2Config(
                n_layer=3, n_embd=32, n_head=2, vocab_size=320, scale_attn_by_inverse_layer_idx=True
            ),
            (0,),
            r"block 1 would have 0.25 for attn.scaling, it has 0.125",
        ),
        (
            lambda: tiny_config("gemma3n_text", num_kv_shared_layers=0),
            (0,),
            r"embed_tokens_per_layer.weight has a part for every block",
        ),
    ],
)
def test_blocks_that_the_model_cannot_do_without_are_refused_by_name(
    config: Callable[[], PreTrainedConfig], removed: tuple[int, ...], message: str
) -> None:
    source = LoadedModel(random_model(model_class_of(config()), config()))
    with pytest.raises(UnsupportedModelError, match=message):
        check_blocks_can_go(source, removed)


def test_the_small_model_of_the_proof_need_not_have_a_valid_config() -> None:
    config = ArceeConfig(num_hidden_layers=3)
    # Its class checks this when it reads a config.
    with pytest.raises(ValueError, match="is not a multiple of the number of attention heads"):
        small_run_of(config).model.config.validate_architecture()
    prove_without_blocks(config, (1,))
