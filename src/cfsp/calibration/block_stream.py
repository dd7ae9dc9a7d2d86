"""The engine: windows flow through a model one block at a time.

All windows pass block 0, then block 1, and so on. Only the embeddings (at the start), one
block and the hidden states are in memory, so the model may be far larger than memory.

Shapes: N windows, B windows in a batch, T tokens, D hidden, F FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.calibration.call_recorder import BlockCall, record_calls
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, load_into, projection_of, unload
from cfsp.errors import CalibrationError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource

# Batches of about this many tokens: large enough for full speed, small enough for a cache.
TOKENS_IN_BATCH = 4096

OnActivations = Callable[[Tensor], None]
OnHidden = Callable[[Tensor, Tensor], None]


@dataclass
class StreamedBlock:
    """One decoder block with its weights, and the windows that are about to pass it.

    Attributes:
        index: position in the model.
        module: the decoder block.
        down: the FFN's down projection.
    """

    index: int
    module: nn.Module
    down: nn.Module
    _hidden_NTD: Tensor
    _batches: list[slice]
    _calls: dict[int, BlockCall]
    _device: torch.device
    _on_batch: Callable[[int], None]

    def advance(self, on_activations: OnActivations, on_hidden: OnHidden) -> None:
        """Let all windows pass the block; the hidden states become its outputs.

        Args:
            on_activations: is given the input of the down projection, act_BTF.
            on_hidden: is given the block's input and output hidden states, both BTD.
        """

        def before_down(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Some families flatten windows and tokens before the FFN.
            on_activations(args[0].view(*windows_and_tokens, -1))

        windows_and_tokens = torch.Size()
        handle = self.down.register_forward_pre_hook(before_down)
        try:
            for batch in self._batches:
                input_BTD = self._hidden_NTD[batch].to(self._device)
                call = self._calls[input_BTD.shape[0]]
                windows_and_tokens = input_BTD.shape[:2]
                output_BTD = call(self.module, input_BTD)
                on_hidden(input_BTD, output_BTD)
                self._hidden_NTD[batch] = output_BTD
                self._on_batch(input_BTD.shape[0] * input_BTD.shape[1])
        finally:
            handle.remove()


def stream_blocks(
    source: WeightSource,
    tokens_NT: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_windows: int | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Iterator[StreamedBlock]:
    """Yield every block in turn; the caller must `advance` each before it asks for the next.

    Args:
        source: the model.
        tokens_NT: windows without padding.
        device: where blocks compute.
        dtype: what they compute in.
        batch_windows: windows that pass together; None for about 4096 tokens.
        on_batch: is told how many tokens have passed a block, after each batch.

    Raises:
        CalibrationError: a weight is NaN or infinite.
        CheckpointError: a tensor is missing.
    """
    size = batch_windows or max(1, TOKENS_IN_BATCH // tokens_NT.shape[1])
    batches = [slice(i, min(i + size, len(tokens_NT))) for i in range(0, len(tokens_NT), size)]
    skeleton = build_skeleton(source.config, dtype)
    blocks = blocks_of(skeleton, source.family)
    with torch.inference_mode():
        hidden_NTD, calls = _embed(skeleton, blocks, source, tokens_NT, batches, device, dtype)
        for index, module in enumerate(blocks):
            load_into(module, source.family.block_prefix(index), source, device, dtype)
            module.to(device)
            _check_finite(module, source, index)
            yield StreamedBlock(
                index=index,
                module=module,
                down=projection_of(module, source.family, source.family.down),
                _hidden_NTD=hidden_NTD,
                _batches=batches,
                _calls={windows: call[index] for windows, call in calls.items()},
                _device=device,
                _on_batch=on_batch,
            )
            unload(module)


def _embed(
    skeleton: nn.Module,
    blocks: nn.ModuleList,
    source: WeightSource,
    tokens_NT: Tensor,
    batches: list[slice],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[int, list[BlockCall]]]:
    """Return the embedded windows, and the block calls for each number of windows in a batch.

    Windows are never padded, so the calls depend on a batch's shape only.
    """
    prefix, path = source.family.base_prefix, source.family.blocks_in_base_model
    base_model: nn.Module = getattr(skeleton, prefix)
    # Everything of the base model but its blocks: they are the only large part.
    placeholder = nn.ModuleList()
    parent_path, _, leaf = path.rpartition(".")
    parent = attrgetter(parent_path)(base_model) if parent_path else base_model
    setattr(parent, leaf, placeholder)
    load_into(base_model, f"{prefix}.", source, device, dtype)
    base_model.to(device)
    setattr(parent, leaf, blocks)

    hidden_NTD: Tensor | None = None
    calls: dict[int, list[BlockCall]] = {}
    for batch in batches:
        tokens_BT = tokens_NT[batch].to(device)
        recording = record_calls(base_model, blocks, tokens_BT)
        embedded_BTD = recording.embedded_BTD
        assert embedded_BTD is not None
        if hidden_NTD is None:
            hidden_NTD = torch.empty((*tokens_NT.shape, embedded_BTD.shape[-1]), dtype=dtype)
        hidden_NTD[batch] = embedded_BTD
        calls.setdefault(tokens_BT.shape[0], recording.calls)
    assert hidden_NTD is not None
    setattr(parent, leaf, placeholder)
    unload(base_model)
    setattr(parent, leaf, blocks)
    return hidden_NTD, calls


def _check_finite(module: nn.Module, source: WeightSource, block: int) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"{source.label}: block {block} has NaN or infinite values in "
                f"{source.family.block_prefix(block)}{name}; the checkpoint is damaged"
            )
