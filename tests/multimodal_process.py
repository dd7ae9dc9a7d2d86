"""What a multimodal checkpoint gives in a fresh process, under stock software only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, dynamic_module_utils
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

NEW_TOKENS = 4

# Llama 4's own forward asks it of what its text decoder returns, which in 5.24 does not have it.
MoeCausalLMOutputWithPast.image_outputs = None


def results_of(model: Any, inputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return logits and a continuation of each input."""
    found = {}
    with torch.inference_mode():
        for name, values in inputs.items():
            found[name] = model(**values).logits
            found[f"{name} generated"] = model.generate(
                **values,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
    return found


def check(checkpoint: str, directory: str) -> None:
    """Read inputs.pt in the directory, write found.pt there: called in a fork."""
    # From here on `import cfsp` fails, as on a machine that does not have it.
    assert not any(name.partition(".")[0] == "cfsp" for name in sys.modules)
    sys.modules["cfsp"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    work = Path(directory)
    # A place for modelling files in which nothing is yet.
    dynamic_module_utils.HF_MODULES_CACHE = str(work / "modules")
    inputs = torch.load(work / "inputs.pt")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    found = {"classes": [type(model).__name__, type(base).__name__], **results_of(model, inputs)}
    head = model.state_dict()
    found["base"] = all(
        torch.equal(tensor, head.get(f"{model.base_model_prefix}.{name}", head.get(name)))
        for name, tensor in base.state_dict().items()
    )
    model.save_pretrained(work / "resaved")
    again = AutoModelForImageTextToText.from_pretrained(work / "resaved", trust_remote_code=True)
    found["resaved"] = results_of(again, inputs)
    torch.save(found, work / "found.pt")
