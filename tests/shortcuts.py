"""What no test can tell from the real thing, and what takes a good part of all the time."""

import gc
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jinja2 import Environment
from torch.nn import init


def take_shortcuts() -> None:
    """In this process wait for no disk, draw nothing for tensors that have no data, compile once.

    Peft makes a model card for every checkpoint, from a template that it compiles anew.
    """
    os.fsync = lambda descriptor: None
    Environment.compile = cache(Environment.compile)
    for name in ("_no_grad_normal_", "kaiming_uniform_"):
        setattr(init, name, _only_with_data(getattr(init, name)))


def begin_to_time() -> None:
    """Begin a process that times a model; no module is looked at when garbage is collected."""
    from cfsp.processes import end_with_parent  # a server of forks has no cfsp

    gc.freeze()
    end_with_parent()


def _only_with_data(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Without it torch goes through all operations of drawing, to find their shapes."""

    def draw_if_there(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else draw(tensor, *args, **options)

    return draw_if_there
