"""What the family contract asks of a fresh process: a checkpoint under stock software only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

NEW_TOKENS = 10


def loss_of(model: torch.nn.Module, tokens_BT: torch.Tensor) -> float:
    """The loss without dropout."""
    with torch.inference_mode():
        loss: float = model.eval()(input_ids=tokens_BT, labels=tokens_BT).loss.item()
    return loss


def check(checkpoint: str, directory: str, matrices: list[str]) -> None:
    """Read tokens.pt in the directory, write found.json and tensors.pt there: called in a fork."""
    # From here on `import cfsp` fails, as on a machine that does not have it.
    assert not any(name.partition(".")[0] == "cfsp" for name in sys.modules)
    sys.modules["cfsp"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    work = Path(directory)
    # A place for modelling files in which nothing is yet.
    dynamic_module_utils.HF_MODULES_CACHE = str(work / "modules")
    tokens_BT = torch.load(work / "tokens.pt")
    found: dict[str, Any] = {"new_tokens": NEW_TOKENS}
    tensors: dict[str, torch.Tensor] = {}

    assert AutoTokenizer.from_pretrained(checkpoint)("a model")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        tensors["logits"] = model(input_ids=tokens_BT).logits
        tensors["hidden"] = base(input_ids=tokens_BT).last_hidden_state
        tensors["generated"] = model.generate(
            tokens_BT[:, :8],
            attention_mask=torch.ones_like(tokens_BT[:, :8]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )

    model.save_pretrained(work / "resaved")
    resaved = AutoModelForCausalLM.from_pretrained(work / "resaved", trust_remote_code=True)
    with torch.inference_mode():
        tensors["resaved_logits"] = resaved(input_ids=tokens_BT).logits

    model.set_attn_implementation("eager")
    found["attention_of_layers"] = [
        module.config._attn_implementation
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    with torch.inference_mode():
        tensors["eager_logits"] = model(input_ids=tokens_BT).logits

    # Experts are parameters of one module, everything else is a module.
    modules = [name for name in matrices if name in dict(resaved.named_modules())]
    parameters = [name for name in matrices if name not in modules]
    config = LoraConfig(r=4, target_modules=modules, target_parameters=parameters)
    lora = get_peft_model(resaved, config)
    trainable = [p for p in lora.parameters() if p.requires_grad]
    found["lora_parameters"] = sum(p.numel() for p in trainable)
    optimizer = torch.optim.SGD(trainable, lr=0.01)
    found["lora_loss_before"] = loss_of(lora, tokens_BT)
    lora.train()(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    optimizer.step()
    found["lora_loss_after"] = loss_of(lora, tokens_BT)

    (work / "found.json").write_text(json.dumps(found))
    torch.save(tensors, work / "tensors.pt")
