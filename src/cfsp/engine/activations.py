"""What enters the down projections of a block, seen while the block runs.

A dense block has one down projection, a module that a hook can watch. Experts of a block are one
module, which picks the rows of each expert itself; while it is watched it runs them one by one.

Shapes: R rows (tokens of a batch), K experts that a token is routed to, D hidden, F FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cfsp.checkpoint.skeleton import projection_of

if TYPE_CHECKING:
    from cfsp.checkpoint.families import Family

# An FFN of the block, its activations (rows x F), and which token of the batch each row is.
OnRows = Callable[[int, Tensor, Tensor], None]


@contextmanager
def observed_activations(block: nn.Module, family: Family, on_rows: OnRows) -> Iterator[None]:
    """Show the input of every down projection of a block whenever the block runs.

    Args:
        block: a decoder block.
        family: its family.
        on_rows: is given the FFN's index (that of the expert, 0 in a dense block), act_RF, and
            the index of each row's token in the flattened batch. The activations of an expert
            are those of the tokens that are routed to it, times the router's weight: what they
            are worth in the block's output.
    """
    if family.experts is None:

        def before_down(module: nn.Module, args: tuple[Any, ...]) -> None:
            act_RF = args[0].flatten(0, -2)
            on_rows(0, act_RF, torch.arange(len(act_RF), device=act_RF.device))

        down = projection_of(block, family, family.down)
        handle = down.register_forward_pre_hook(before_down)
        try:
            yield
        finally:
            handle.remove()
        return
    experts: Any = attrgetter(f"{family.mlp}.experts")(block)
    experts.forward = partial(_run_experts, experts, on_rows)
    try:
        yield
    finally:
        del experts.forward  # the class's own is back


def _run_experts(
    experts: Any, on_rows: OnRows, hidden_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor
) -> Tensor:
    """Return the experts' output, one expert after the other, and show their activations."""
    output_RD = torch.zeros_like(hidden_RD)
    for expert in range(experts.down_proj.shape[0]):
        token_R, slot_R = torch.where(expert_RK == expert)
        if len(token_R) == 0:
            continue
        both = functional.linear(hidden_RD[token_R], experts.gate_up_proj[expert])
        gate_RF, up_RF = both.chunk(2, dim=-1)
        act_RF = experts.act_fn(gate_RF) * up_RF
        share_R = weight_RK[token_R, slot_R, None]
        on_rows(expert, act_RF * share_R.to(act_RF.dtype), token_R)
        part_RD = functional.linear(act_RF, experts.down_proj[expert]) * share_R
        output_RD.index_add_(0, token_R, part_RD.to(output_RD.dtype))
    return output_RD
