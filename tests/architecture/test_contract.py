"""The contract of architectures, once for every tiny model and for each representative."""

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers.models.auto import modeling_auto as auto

import stock
from architecture_contract import ArchitectureContract, ThoroughContract
from builders import never
from cfsp.checkpoint.skeleton import architecture_of
from family_contract import held_against
from stock import ask
from tiny_decoders import REPRESENTATIVES, model_class, random_model, tiny_config
from tiny_models import TINY_CONFIGS

# Of each kind one: fused and interleaved gates, no gate, transposed matrices, experts beside dense
# FFNs and shared ones, blocks without an FFN, and text decoders of multimodal models.
ALWAYS = (
    "gemma3", "gemma4", "qwen3_5", "qwen3_next", "gpt_oss", "deepseek_v3", "llama4", "nemotron_h",
    "granitemoehybrid", "lfm2", "falcon", "bloom", "qwen2_5_vl", "glm4v",
)  # fmt: skip
# Their FFNs are Llama's, or those of another one that is there.
LIKE_OTHERS = (
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "smollm3", "gemma3_text", "granite",
    "phi", "opt", "qwen3_moe",
)  # fmt: skip
THOROUGH = (
    "llama-biased", "phi3", "gpt2", "opt-projected", "qwen2_moe", "gemma3", "gpt_oss",
    "deepseek_v3", "nemotron_h", "bloom",
)  # fmt: skip
# .ci/versions sets the variable.
EVERY = "CFSP_EVERY_FAMILY" in os.environ
# `make families` sets this one.
EVERY_TYPE = "CFSP_EVERY_TYPE" in os.environ
MOST_PARAMETERS = 5_000_000
# transformers does not read these back from the checkpoint that it saves of them itself.
NOT_READ_BACK = ("shieldgemma2",)


def _proved_types() -> Iterator[str]:
    """Yield the types of transformers that pass the proof, where a tiny model of one can run."""
    known = (
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for model_type in sorted({*known} - {*NOT_READ_BACK}):
        try:
            of_class, config = model_class(model_type), tiny_config(model_type)
            with torch.device("meta"):
                size = of_class._from_config(copy.deepcopy(config)).num_parameters()
            if size > MOST_PARAMETERS:
                continue
            architecture_of(config)
            model = random_model(of_class, config)
            with torch.inference_mode():  # with a cache, as generation does
                model(input_ids=torch.arange(2, 14)[None])
        except Exception:  # a tiny config that does not suit, or a type that is refused
            continue
        yield model_type


NAMES = dict.fromkeys(
    (
        *(name for name in TINY_CONFIGS if EVERY or name not in LIKE_OTHERS),
        *ALWAYS,
        *((*REPRESENTATIVES, "qwen3_vl_moe") if EVERY else ()),
        *(_proved_types() if EVERY_TYPE else ()),
    )
)


def _contract(name: str) -> type[ArchitectureContract]:
    class_name = "Test" + "".join(part.capitalize() for part in name.split("-"))
    base = ThoroughContract if EVERY or name in THOROUGH else ArchitectureContract
    return type(class_name, (base,), {"name": name, "__module__": __name__})


for _name in NAMES:
    _class = _contract(_name)
    globals()[_class.__name__] = _class
del _class


# The contract itself.


def test_what_the_dense_model_fails_too_is_not_held_against_the_type():
    assert held_against({}, never) == {}
    problems = {"base": "others", "adapters": "none"}
    assert held_against(problems, lambda: {"adapters": "no names"}) == {"base": "others"}
    assert held_against({"logits": "others"}, lambda: {"logits": "others"}) == {"logits": "others"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_every_check_can_fail(make_case, tmp_path, monkeypatch):
    question = make_case("llama", {}, sparsity=0.4, multiple=1).question
    assert ask(question, tmp_path / "as it is").problems == {}

    wrong = {name: tensor + 1 for name, tensor in question.expected.items()}
    other = replace(question, expected=wrong, class_name="OtherForCausalLM", matrices=["no.weight"])
    found = ask(other, tmp_path / "wrong").problems
    assert "PeftModule" in found.pop("adapters")
    assert found == {
        "loads": "expected the class PrunedOtherForCausalLM, found PrunedLlamaForCausalLM",
        "logits": "expected what the masked original computes, found a difference of 1.0e+00",
        "cache": "expected the tokens that the masked original generates, found others",
        "attention": "expected what the masked original computes, found a difference of 1.0e+00",
    }
    # What does not load is asked no more.
    nothing = replace(question, checkpoint=str(tmp_path / "nothing"))
    assert list(ask(nothing, tmp_path).problems) == ["loads"]
    # What is saved must be the same bit for bit.
    monkeypatch.setattr(stock, "TOLERANCE", 0.1)
    calls, original = iter(range(100)), stock.logits_of
    monkeypatch.setattr(stock, "logits_of", lambda *args: original(*args) + 1e-3 * next(calls))
    assert ask(question, tmp_path / "saved").problems == {
        "saved": "expected the same logits of the model that was saved and read again, found others"
    }
