"""What the contract asks of a fresh process: a checkpoint under stock software only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, dynamic_module_utils
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

NEW_TOKENS = 10

# Llama 4's own forward asks it of what its text decoder returns, which in 5.24 does not have it.
MoeCausalLMOutputWithPast.image_outputs = None


def loss_of(model: torch.nn.Module, tokens_BT: torch.Tensor) -> float:
    """The loss without dropout."""
    with torch.inference_mode():
        loss: float = model.eval()(input_ids=tokens_BT, labels=tokens_BT).loss.item()
    return loss


def generated(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """What a model writes with its cache, the likeliest token each time."""
    with torch.inference_mode():
        found: Any = model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return found  # type: ignore[no-any-return]


def attention_of_layers(model: torch.nn.Module) -> list[str]:
    """The attention implementation that every attention of a model reads in its config."""
    return [
        module.config._attn_implementation
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config")
    ]


def check(checkpoint: str, directory: str, auto_class: str, matrices: list[str]) -> None:
    """Read tokens.pt in the directory, write found.json and tensors.pt there: called in a fork."""
    # From here on `import cfsp` fails, as on a machine that does not have it.
    assert not any(name.partition(".")[0] == "cfsp" for name in sys.modules)
    sys.modules["cfsp"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = Path(directory)
    # A place for modelling files in which nothing is yet.
    dynamic_module_utils.HF_MODULES_CACHE = str(work / "modules")
    tokens_BT = torch.load(work / "tokens.pt")
    found: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    auto: Any = getattr(transformers, auto_class)

    assert AutoTokenizer.from_pretrained(checkpoint)("a model")["input_ids"]
    model = auto.from_pretrained(checkpoint, trust_remote_code=True)
    found["classes"] = [kind.__name__ for kind in type(model).__mro__]
    stored = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    found["elements"] = sum(stored.values())
    with torch.inference_mode():
        tensors["logits"] = model(input_ids=tokens_BT).logits
        if "AutoModel" in getattr(model.config, "auto_map", ()):
            base = transformers.AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
            tensors["hidden"] = base(input_ids=tokens_BT)[0]
    tensors["generated"] = generated(model, tokens_BT[:, :8])

    model.save_pretrained(work / "resaved")
    resaved = auto.from_pretrained(work / "resaved", trust_remote_code=True)
    with torch.inference_mode():
        tensors["resaved_logits"] = resaved(input_ids=tokens_BT).logits

    model.set_attn_implementation("eager")
    found["attention_of_layers"] = attention_of_layers(model)
    with torch.inference_mode():
        tensors["eager_logits"] = model(input_ids=tokens_BT).logits

    # Experts are parameters of one module, everything else is a module.
    modules = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    parameters = [name for name in matrices if not name.endswith(".weight")]
    config = LoraConfig(r=4, target_modules=modules, target_parameters=parameters)
    lora = get_peft_model(resaved, config)
    trainable = [p for p in lora.parameters() if p.requires_grad]
    # Of some types PEFT makes other targets than it was given.
    found["lora_targets"] = sorted(lora.peft_config["default"].target_modules)
    found["lora_parameters"] = sum(p.numel() for p in trainable)
    optimizer = torch.optim.SGD(trainable, lr=0.001)
    found["lora_loss_before"] = loss_of(lora, tokens_BT)
    lora.train()(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    optimizer.step()
    found["lora_loss_after"] = loss_of(lora, tokens_BT)

    (work / "found.json").write_text(json.dumps(found))
    torch.save(tensors, work / "tensors.pt")
