"""In which dtype a model computes: its own where the device has that, else the faster float32."""

import pytest
import torch

import cfsp
from builders import tensors
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.recovery.adaptation import training_dtype
from cfsp.settings import Compute
from cfsp.streaming.runtime import runtime_of
from tiny_models import build_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def is_native(request, monkeypatch) -> bool:
    monkeypatch.setattr("cfsp.checkpoint.loading.is_native", lambda dtype, device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16])
def test_the_models_own_dtype_unless_it_is_emulated(save, is_native, own):
    source = open_checkpoint(save(build_tiny_model("llama", dtype=own), str(own)))
    runtime = runtime_of(Compute("cpu"), source)
    assert runtime.dtype == (own if is_native else torch.float32)
    named = runtime_of(Compute("cpu", "bfloat16"), source)
    assert named.dtype == torch.bfloat16
    # In float16 gradients overflow.
    may_train = is_native and own == torch.bfloat16
    assert training_dtype(source, CPU, "auto") == (own if may_train else torch.float32)


def test_a_model_in_memory_is_pruned_as_its_directory_is(save, is_native, tokenizer, few, tmp_path):
    directory = save(build_tiny_model("llama", dtype=torch.bfloat16), "narrow")
    model = cfsp.load(directory)
    cfsp.prune(str(directory), sparsity=0.5, out=tmp_path / "out", **few)
    smaller = cfsp.prune(model, tokenizer, sparsity=0.5, **few)
    assert {p.dtype for each in (model, smaller) for p in each.parameters()} == {torch.bfloat16}
    written, state = tensors(tmp_path / "out"), smaller.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in written.items())
