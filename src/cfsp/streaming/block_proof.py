"""The proof, by execution, that blocks, attention layers or experts can go: skipped is cut.

A small random model of the same class runs on a few tokens, once with the blocks skipped, and once
built without them, from a config of its own. Both must compute the same. Attention is skipped by
zeros in the place of their output, and cut as the modelling file cuts it; a cache must then make
no difference to what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cfsp.architecture.block_names import blocks_in_words, index_without
from cfsp.architecture.expert_proof import check_experts, refusing_experts
from cfsp.architecture.found import Architecture, Unit
from cfsp.architecture.proof import small_run_of
from cfsp.architecture.resizing import remove_attentions
from cfsp.architecture.small_run import (
    TOKENS,
    TOLERANCE,
    FailedCheckError,
    SmallRun,
    call_decoder,
    check_bites,
    check_same,
    checking,
    difference,
    first_tensor,
    rebuilt,
    run_decoder,
    small_tokens,
)
from cfsp.checkpoint.loading import cache_argument
from cfsp.checkpoint.pruned_config import by_place
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import stock_config
from cfsp.checkpoint.stock_keys import (
    changes_without_blocks,
    stock_without_blocks,
    with_same_changes,
)
from cfsp.checkpoint.stored_blocks import name_without_blocks
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.stand_in import find_call_form, skipped

_CPU = torch.device("cpu")


@torch.no_grad()
def prove_without_blocks(stock: PreTrainedConfig, removed: Collection[int]) -> None:
    """Check that the model of a stock config computes without blocks as if they were skipped."""
    changes = changes_without_blocks(stock, removed)
    run = small_run_of(stock)
    decoder: Any = run.model.get_submodule(run.architecture.decoder)
    what = f"{blocks_in_words(removed)} of {run.architecture.class_name} can't be removed"
    if min(removed) < (first := _first_without_images(stock)):
        raise UnsupportedModelError(
            f"{what}: features of images are added after blocks up to {first - 1}, by their number"
        )
    with _refused(what):
        with checking("skipped", "that the others need nothing of them but a hidden state"):
            form = find_call_form(partial(run_decoder, decoder), run.blocks, _CPU)
            with skipped(run.blocks, removed, form):
                expected = run.decoder_output()
        dense = run.decoder_output()
        check_bites("without them", dense, expected)
        cut = _cut(run, changes, removed)
        for check, again in _checks(run, dense, cut):
            check_same(check, "the output with these blocks skipped", again, expected)


@torch.no_grad()
def prove_without_attentions(
    stock: PreTrainedConfig,
    architecture: Architecture,
    removed: Collection[int],
    removed_blocks: Collection[int] = (),
) -> None:
    """Check that the model computes the same without attention layers as with nothing from them.

    Those that are gone already are among them.
    """
    name, blocks = architecture.class_name, blocks_in_words(removed_blocks)
    what = f"the attention layers of {blocks_in_words(removed)} of {name} can't be removed"
    if not removed:
        what = f"{blocks} of {name} can't be removed beside the attention layers that are gone"
    elif removed_blocks:
        what += f" beside {blocks}"
    if removed_blocks:
        stock, architecture, _ = stock_without_blocks(stock, architecture, removed_blocks)
        removed = [index_without(removed_blocks, block) for block in removed]
    run = small_run_of(stock)
    attentions = architecture.of_part("kv").stock_units
    gone = {unit.block for unit in architecture.gone}
    kinds = getattr(text_config_of(stock), "layer_types", None)
    _check_some_stay(attentions, {*removed, *gone}, kinds, what)
    leaving = [unit for unit in attentions if unit.block in removed or unit.block in gone]
    dense = run.decoder_output()
    with _refused(what):
        with checking("zeros", "that it runs with nothing from them"), ExitStack() as stack:
            for unit in leaving:
                attention = run.blocks[unit.block].get_submodule(unit.path)
                stack.enter_context(attention.register_forward_hook(_nothing))
            expected = run.decoder_output()
        check_bites("without them", dense, expected)
        checks = list(_checks(run, dense, run))  # while nothing is gone
        with _without_attentions(run, attentions, leaving, kinds):
            for check, again in checks:
                check_same(check, "the output with nothing from them", again, expected)


def check_experts_can_go(
    source: WeightSource, kept: Mapping[int, Sequence[int]], removed_blocks: Collection[int]
) -> None:
    """Check that a model with some experts a block computes as if its router chose among these."""
    stock, architecture, _ = stock_without_blocks(
        stock_config(source.config), source.architecture, removed_blocks
    )
    kept = {index_without(removed_blocks, block): experts for block, experts in kept.items()}
    with refusing_experts(architecture):
        check_experts(architecture, small_run_of(stock), kept)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Say in words what can't go where a check fails."""
    try:
        yield
    except FailedCheckError as failure:
        raise UnsupportedModelError(f"{what}: they failed the check {failure}") from failure


def _check_some_stay(
    attentions: Sequence[Unit], removed: Collection[int], kinds: Sequence[str] | None, what: str
) -> None:
    """Check that every removed attention can be told apart, and that one of its kind stays."""
    blocks = [unit.block for unit in attentions]
    for block in removed:
        if blocks.count(block) != 1:
            raise UnsupportedModelError(
                f"{what}: expected one attention in block {block} whose heads are found, found "
                f"{blocks.count(block)}"
            )
        alike = [other for other in blocks if kinds is None or kinds[other] == kinds[block]]
        if set(alike) <= set(removed):
            kind = "" if kinds is None else f" of the kind {kinds[block]}"
            raise UnsupportedModelError(f"{what}: at least one{kind} must stay")


@contextmanager
def _without_attentions(
    run: SmallRun, attentions: Sequence[Unit], leaving: Sequence[Unit], kinds: Sequence[str] | None
) -> Iterator[None]:
    """Cut attention layers out of a small model; put them back afterwards."""
    originals: list[Any] = [run.blocks[unit.block].get_submodule(unit.path) for unit in attentions]
    indices = [getattr(original, "layer_idx", None) for original in originals]
    groups_of = by_place(attentions, [int(unit not in leaving) for unit in attentions])
    extras = {unit.path: unit.extras for unit in attentions}
    remove_attentions(run.blocks, groups_of, extras, kinds)
    try:
        yield
    finally:
        for unit, original, index in zip(attentions, originals, indices, strict=True):
            original.layer_idx = index
            run.blocks[unit.block].set_submodule(unit.path, original)


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    """Return zeros in the place of what an attention gave."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _first_without_images(config: PreTrainedConfig) -> int:
    """Return the first block after which nothing of an image is added to hidden states.

    Which blocks these are, a class knows by their numbers, as transformers' DeepStack does.
    """
    first, left = 0, [config.to_dict()]
    while left:
        fields = left.pop()
        left += [each for each in fields.values() if isinstance(each, dict)]
        after = [
            *range(len(fields.get("deepstack_visual_indexes") or ())),
            *(block for _, block in fields.get("deepstack_layer_map") or ()),
            *(fields.get("spatial_target_layers") or ()),
        ]
        first = max([first, *(block + 1 for block in after)])
    return first


def _checks(
    run: SmallRun, dense: Tensor, cut: SmallRun
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield what a cut model must give: also with a cache, where the whole one can have it so."""
    yield "cut", cut.decoder_output
    # Some state-space blocks go on with one token only.
    for first in (TOKENS // 2, TOKENS - 1):
        if _takes_cache(run, first, dense):
            yield "cache", partial(_run_with_cache, cut, first)


def _takes_cache(run: SmallRun, first: int, expected: Tensor) -> bool:
    """Return whether a cache makes no difference to a small model as it is."""
    try:
        return difference(_run_with_cache(run, first), expected) <= TOLERANCE
    except Exception:  # whatever a class does that has none
        return False


def _run_with_cache(run: SmallRun, first: int) -> Tensor:
    """Return what the decoder gives for the tokens of a run: so many first, then the others."""
    decoder: Any = run.model.get_submodule(run.architecture.decoder)
    tokens_BT = small_tokens(run.model)
    begun = call_decoder(decoder, tokens_BT[:, :first], use_cache=True)
    name = cache_argument(decoder)
    seen = {name: getattr(begun, name)}
    ended = call_decoder(decoder, tokens_BT[:, first:], use_cache=True, **seen)
    return torch.cat([first_tensor(begun), first_tensor(ended)], dim=1)


def _cut(run: SmallRun, changes: Mapping[str, Any], removed: Collection[int]) -> SmallRun:
    """Return the small model without some blocks; `changes` are those of the large one's config."""
    config: Any = run.model.config
    config = with_same_changes(config, changes, removed, run.architecture.block_count)

    def place_of(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        new = name_without_blocks(run.architecture, removed, name)
        return (new, tensor) if new and isinstance(tensor, nn.Parameter) else None

    return rebuilt(run, config, place_of)
