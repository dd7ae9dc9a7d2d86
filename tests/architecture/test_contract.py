"""The contract of architectures, once for every tiny model and for each representative."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
)

import cfsp
from architecture_contract import ArchitectureContract, ThoroughContract
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import architecture_of
from tiny_decoders import REPRESENTATIVES, model_class, random_model, tiny_config
from tiny_models import TINY_CONFIGS

# Of each kind one: fused and interleaved gates, no gate, transposed matrices, experts beside dense
# FFNs and shared ones, blocks without an FFN, and text decoders of multimodal models.
ALWAYS = (
    "gemma3", "gemma4", "qwen3_5", "qwen3_next", "gpt_oss", "deepseek_v3", "llama4", "nemotron_h",
    "granitemoehybrid", "jamba", "lfm2", "falcon", "bloom",
)  # fmt: skip
# Their FFNs are Llama's.
LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "stablelm")
THOROUGH = (
    "llama", "llama-biased", "phi3", "gpt2", "opt-projected", "mixtral", "qwen2_moe", "gemma3",
    "qwen3_5", "gpt_oss", "deepseek_v3", "nemotron_h", "bloom",
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
    for model_type in sorted({*CAUSAL, *MULTIMODAL} - {*NOT_READ_BACK}):
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
        *(name for name in TINY_CONFIGS if EVERY or name not in LIKE_LLAMA),
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


def test_checkpoint_of_the_base_model_alone(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Such are GPT-2's on the hub: names without the base model's, and causal masks stored."""
    source = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    stripped["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(stripped, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(source)
    assert checkpoint.specs.keys() == tensors.keys()

    settings = {
        "sparsity": 0.4,
        "multiple": 1,
        "samples": 4,
        "seqlen": 32,
        "data": [str(text_file)],
    }
    expected = cfsp.prune(tiny_checkpoint("gpt2"), out=tmp_path / "expected", **settings)
    found = cfsp.prune(source, out=tmp_path / "found", **settings)
    assert found.parameters_before == expected.parameters_before
    name = "model.safetensors"
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
