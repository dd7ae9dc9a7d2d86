from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn

from cfsp.architecture import resizing
from cfsp.architecture.resizing import resize_ffn


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6, dtype=dtype)
        self.inside = nn.Module()
        self.inside.width = 6
        self.inside.gate_up = nn.Parameter(torch.ones(3, 12, 4, dtype=dtype), requires_grad=False)
        self.inside.down = nn.Parameter(torch.ones(3, 4, 6, dtype=dtype))


AXES = {"inside.gate_up": (1, 2), "inside.down": (2, 1)}


@pytest.mark.parametrize("width", [1, 2, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_parameters_and_attributes_get_the_new_width(width: int, dtype: torch.dtype) -> None:
    block = Block(dtype)
    untouched = dict(block.fc.named_parameters())
    resize_ffn(block, width, AXES, [("inside", "width", 1)])
    assert block.inside.gate_up.shape == (3, 2 * width, 4)
    assert block.inside.down.shape == (3, 4, width)
    assert block.inside.width == width
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert not block.inside.gate_up.requires_grad
    assert block.inside.down.requires_grad
    assert all(new is untouched[name] for name, new in block.fc.named_parameters())
    assert list(dict(block.named_parameters())) == list(dict(Block().named_parameters()))


def test_parameters_of_the_block_itself() -> None:
    block = Block()
    resize_ffn(block, 5, {"fc.weight": (0, 1), "fc.bias": (0, 1)}, [("fc", "out_features", 1)])
    assert block.fc.out_features == 5
    assert block.fc.weight.shape == (5, 4)
    assert block.fc.bias.shape == (5,)
    assert block.fc.weight.requires_grad


def test_on_the_meta_device() -> None:
    block = Block().to("meta")
    resize_ffn(block, 2, AXES, [])
    assert block.inside.down.is_meta


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError):
        resize_ffn(Block(), 2, {"inside.up": (0, 1)}, [])


def test_its_source_needs_nothing_but_torch() -> None:
    tree = ast.parse(inspect.getsource(resizing))
    modules = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert modules == {"__future__", "collections", "collections.abc", "typing", "torch"}
