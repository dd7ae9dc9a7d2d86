"""What the contract asks of a fresh process: a checkpoint under stock software only."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

STOCK = Path(__file__).resolve().parent.parent / "src" / "cfsp" / "families" / "stock.py"

# Llama 4's own forward asks it of what its text decoder returns, which in 5.24 does not have it.
MoeCausalLMOutputWithPast.image_outputs = None


def check(directory: str) -> None:
    """Read question.pt in a directory, write answer.pt there: called in a fork."""
    # The file alone: `import cfsp` fails, as on a machine that does not have it.
    assert not any(name.partition(".")[0] == "cfsp" for name in sys.modules)
    spec = spec_from_file_location("stock", STOCK)
    assert spec is not None and spec.loader is not None
    stock: Any = module_from_spec(spec)
    sys.modules["stock"] = stock
    spec.loader.exec_module(stock)
    stock.without_cfsp()
    work = Path(directory)
    answer = stock.ask(stock.Question.load(work / "question.pt"), work)
    torch.save(vars(answer), work / "answer.pt")
