"""Multimodal checkpoints: the text decoder is pruned where it stands, all else travels untouched.

Shapes: B windows, T tokens.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4ForConditionalGeneration

from builders import changed, raising, read_json, tensors
from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import UnsupportedModelError
from cfsp.recovery.loss import loss_inside
from cfsp.selection.divergence import masked_channels
from family_contract import Case
from tiny_decoders import tiny_model

BEFORE, AFTER = [0, 20, 21], [30, 31, 32, 33]

# How many tokens the image becomes; of each kind one: other names in files, positions of three
# axes, linear attention.
IMAGE_TOKENS = {"gemma3": 4, "qwen2_5_vl": 4, "qwen3_5": 4}
# Images as rows of patches, with a number of rows and columns beside.
_IN_A_GRID = ("qwen2_5_vl", "qwen3_5")


@pytest.fixture(scope="module", params=IMAGE_TOKENS)
def case(request, make_case):
    return make_case(request.param, {}, sparsity=0.4, multiple=8, samples=4)


def inputs_of(case: Case) -> dict[str, dict[str, Tensor]]:
    """Return words alone, and an image among a few words."""
    tokens_BT = torch.randint(4, 290, (2, 12), generator=torch.Generator().manual_seed(3))
    return {
        "text": {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)},
        "image": image_inputs(case.dense.config),
    }


def results_of(model: Any, inputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return logits and a continuation of each input."""
    found = {}
    with torch.inference_mode():
        for name, values in inputs.items():
            found[name] = model(**values).logits
            of = {"max_new_tokens": 4, "min_new_tokens": 4, "eos_token_id": None, "pad_token_id": 2}
            found[f"{name} generated"] = model.generate(**values, do_sample=False, **of)
    return found


def image_inputs(config: Any) -> dict[str, Tensor]:
    """Return what a processor would make of an image with a few words before and behind."""
    model_type, tower = config.model_type, config.vision_config
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    tokens_BT = torch.tensor([[*BEFORE, *IMAGE_TOKENS[model_type] * [image], *AFTER]])
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    generator = torch.Generator().manual_seed(0)
    if model_type in _IN_A_GRID:
        values = 3 * tower.temporal_patch_size * tower.patch_size**2
        inputs["pixel_values"] = torch.rand(16, values, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (tokens_BT == image).int()
    else:
        side = tower.image_size
        inputs["pixel_values"] = torch.rand(1, 3, side, side, generator=generator)
    return inputs


def test_it_does_with_images_what_the_masked_original_does(case):
    """Without cfsp stock software does so with words: architecture/test_contract.py."""
    inputs = inputs_of(case)
    kept = dict(enumerate(case.report.plan.kept_channels))
    with masked_channels(LoadedModel(case.dense), case.dense, kept):
        expected = results_of(case.dense, inputs)
    dense, found = (results_of(model, inputs) for model in (case.dense, case.loaded))
    for name, result in expected.items():
        torch.testing.assert_close(found[name], result, rtol=1e-4, atol=1e-4)
    for name in inputs:
        assert (expected[name] - dense[name]).abs().max() > 1e-2  # the mask bites


def test_the_rest_of_its_config_is_untouched(case):
    own, pruned = (read_json(at / "config.json") for at in (case.source, case.out))
    ours = {"architectures", "auto_map", "ffn_widths"}
    assert {key for key in pruned if pruned[key] != own.get(key)} == ours
    assert pruned["auto_map"].keys() >= {"AutoModel", "AutoModelForImageTextToText"}


@pytest.fixture(scope="module")
def gemma(save):
    """A checkpoint with the names of the parameters, which are not those that are saved."""
    model = tiny_model("gemma3")
    source = save(model)
    file = source / "model.safetensors"
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert load_file(file).keys().isdisjoint(state)
    save_file(state, file, metadata={"format": "pt"})
    return source


def test_repair_and_recovery_write_the_stored_names(gemma, text_file, tmp_path, command):
    text = ["--data", text_file, "--seqlen", 32, "--device", "cpu"]
    pruned, trained = tmp_path / "pruned", tmp_path / "trained"
    how = ["--sparsity", 0.5, "--multiple", 8, "--samples", 17, "--repair", "sequential"]
    command("prune", gemma, *text, *how, "--out", pruned)
    steps = read_json(pruned / "cfsp.json")["repair"]["steps"]
    assert [step["name"] for step in steps] == ["ridge", "sequential"]
    # New weights were used and judged: not a block was rejected because nothing had changed.
    for step, judged_by in zip(steps, ("error", "loss"), strict=True):
        better = [b[f"{judged_by}_after"] < b[f"{judged_by}_before"] for b in step["blocks"] if b]
        assert any(better)

    command("recover", pruned, *text, "--steps", 1, "--method", "full", "--out", trained)
    command("verify", trained)
    assert tensors(gemma).keys() == tensors(pruned).keys()
    learnt = changed(pruned, trained)
    assert learnt
    assert all(".layers." in name and "vision" not in name for name in learnt)


def test_a_class_that_cannot_run_is_not_trained(monkeypatch):
    fails = raising(AttributeError("as that of transformers 5.24"))
    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", fails)
    with (
        pytest.raises(UnsupportedModelError, match=r"Llama4ForCond.* its own forward fails in"),
        loss_inside(tiny_model("llama4")),
    ):
        pass


@pytest.mark.parametrize("case", ["qwen2_5_vl"], indirect=True)
def test_commands(case, text_file, command):
    for name in ("inspect", "verify"):
        command(name, case.out)
    command("eval", case.source, case.out, "--data", text_file, "--seqlen", 32, "--windows", 2)
    card = (case.out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
