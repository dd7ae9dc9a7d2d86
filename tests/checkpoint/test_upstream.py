"""Whether the installed transformers still needs the code that we write beside the weights."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import cfsp
from ragged import cut, tiny
from stock import logits_of

TOKENS = torch.tensor([[5, 300, 7, 111, 42, 260, 9, 77]])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_stock_classes_do_not_read_per_layer_config_yet(tmp_path, tokenizer, name):
    """Skips while they do not; fails as soon as one does: docs/UPSTREAM.md says what then."""
    source = cut(tiny(name), tokenizer, tmp_path)
    stock_name = source.architecture.class_name
    bare = tmp_path / "bare"
    shutil.copytree(source.directory, bare)
    fields = json.loads((bare / "config.json").read_text())
    # What sends transformers to our code instead of to its own.
    del fields["auto_map"]
    (bare / "config.json").write_text(json.dumps({**fields, "architectures": [stock_name]}))
    here = f"transformers {transformers.__version__}: {stock_name}"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            bare, trust_remote_code=False, dtype=torch.float32
        )
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"{here} does not read per_layer_config: {str(error).splitlines()[0][:100]}")
    models = model.eval(), cfsp.load(source.directory)
    if not torch.equal(*(logits_of(each, TOKENS) for each in models)):
        pytest.fail(f"{here} loads blocks of different widths and computes something else")
    pytest.fail(
        f"{here} reads per_layer_config by itself: the remote code is no longer needed for it; "
        "see docs/UPSTREAM.md"
    )
