"""What no test can tell from the real thing, and what takes a good part of all the time."""

import os
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import Environment
from jinja2.lexer import get_lexer
from torch.nn import init


def take_shortcuts() -> None:
    """In this process wait for no disk, draw nothing for tensors that have no data, compile once.

    Every checkpoint has a model card, as has every adapter of peft, of a template that is the same.
    """
    os.fsync = lambda descriptor: None
    Environment.compile = _compiled_once(Environment.compile)
    for name in ("_no_grad_normal_", "kaiming_uniform_"):
        setattr(init, name, _only_with_data(getattr(init, name)))


def _only_with_data(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Without it torch goes through all operations of drawing, to find their shapes."""

    def draw_if_there(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else draw(tensor, *args, **options)

    return draw_if_there


def _compiled_once(compile: Callable[..., Any]) -> Callable[..., Any]:
    """Environments that read and escape alike make the same code of a template."""
    known: dict[tuple[object, ...], Any] = {}

    def compile_once(environment: Any, *template: Any) -> Any:
        how = (type(environment), environment.autoescape, *environment.extensions)
        key = (*how, get_lexer(environment), *template)
        if key not in known:
            known[key] = compile(environment, *template)
        return known[key]

    return compile_once
