"""The proof, by execution, that blocks of a model can go: skipped is cut.

A small random model of the same class runs on a few tokens, once with the blocks skipped, and once
built without them, from a config of its own. Both must compute the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.block_names import blocks_in_words
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.proof import LEAST_EFFECT, TOLERANCE, difference, run_without_verdict
from cfsp.architecture.small_run import (
    SmallRun,
    first_line,
    first_tensor,
    set_parameter,
    small_skeleton,
    small_tokens,
)
from cfsp.checkpoint.config_blocks import changes_without_blocks, config_without_blocks
from cfsp.checkpoint.config_widths import stock_config
from cfsp.checkpoint.stored_blocks import names_without_blocks
from cfsp.checkpoint.stored_tensors import name_without_blocks
from cfsp.engine.call_form import find_call_form
from cfsp.engine.resumed_forward import skipped
from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp.checkpoint.reading import WeightSource

_CPU = torch.device("cpu")
# Of one command, which asks about set after set.
_small_runs: dict[str, SmallRun] = {}


@torch.no_grad()
def check_blocks_can_go(source: WeightSource, removed: Collection[int]) -> None:
    """Check that a model can be written without some blocks, and computes as if they were skipped.

    Args:
        source: the model.
        removed: indices of the blocks that go; not all.

    Raises:
        UnsupportedModelError: its config cannot say it, blocks that stay need something of them
            besides the hidden state, or tensors cannot be told apart.
    """
    names_without_blocks(source, removed)
    stock = stock_config(source.config)
    changes_without_blocks(stock, removed)
    run = _small_run(stock)
    decoder: Any = run.model.get_submodule(run.architecture.decoder)
    tokens_BT = small_tokens(run.model)
    what = f"{blocks_in_words(removed)} of {run.architecture.class_name} can't be removed"
    try:
        form = find_call_form(lambda tokens: _run(decoder, tokens), run.blocks, _CPU)
        with skipped(run.blocks, removed, form):
            expected = _run(decoder, tokens_BT)
    except Exception as error:  # however a model misses what its stand-ins do not leave
        raise UnsupportedModelError(
            f"{what}: they failed the check skipped: expected that the others need nothing of them "
            f"but a hidden state, found {first_line(error)}"
        ) from error
    effect = difference(_run(decoder, tokens_BT), expected)
    if not effect > LEAST_EFFECT:
        raise UnsupportedModelError(
            f"{what}: they failed the check bites: expected another output without them, found a "
            f"difference of {effect:.1e}"
        )
    found = _run(_cut(run, removed), tokens_BT)
    if not (error_found := difference(found, expected)) <= TOLERANCE:
        raise UnsupportedModelError(
            f"{what}: they failed the check cut: expected the output with these blocks skipped, "
            f"found a relative difference of {error_found:.1e}"
        )


def _small_run(stock: PreTrainedConfig) -> SmallRun:
    key = f"{type(stock).__name__} {stock.to_json_string(use_diff=False)}"
    if key not in _small_runs:
        _small_runs.clear()
        _small_runs[key] = run_without_verdict(stock, model_class_of(stock))
    return _small_runs[key]


def _cut(run: SmallRun, removed: Collection[int]) -> nn.Module:
    """Return the decoder of the small model, built without some blocks and with its weights."""
    config: Any = run.model.config
    smaller = config_without_blocks(config, changes_without_blocks(config, removed))
    model: Any = small_skeleton(smaller, type(run.model))
    for name, parameter in run.model.named_parameters(remove_duplicate=False):
        new = name_without_blocks(run.architecture, removed, name)
        if new is not None and not parameter.is_meta:
            set_parameter(model, new, parameter)
    decoder: nn.Module = model.get_submodule(run.architecture.decoder)
    return decoder


def _run(decoder: Any, tokens_BT: Tensor) -> Tensor:
    return first_tensor(decoder(input_ids=tokens_BT, use_cache=False))
