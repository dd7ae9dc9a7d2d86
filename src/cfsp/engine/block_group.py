"""Consecutive blocks of a model as one function of the hidden states.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import fill, read_tensors, unload
from cfsp.engine.call_recorder import BlockCall

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource


class BlockGroup:
    """Some blocks of a model, which compute one after the other.

    They have no weights before the first `fill` and after `unload`.

    Args:
        source: where their tensors come from.
        modules: the blocks.
        first: index of the first of them in the model.
        calls: how the model calls each of them, by the number of windows in a batch.
        device: where they compute.

    Attributes:
        modules: the blocks.
    """

    def __init__(
        self,
        source: WeightSource,
        modules: Sequence[nn.Module],
        first: int,
        calls: Mapping[int, Sequence[BlockCall]],
        device: torch.device,
    ) -> None:
        self._source, self._first = source, first
        self.modules = list(modules)
        self._prefixes = [
            source.architecture.block_prefix(first + position) for position in range(len(modules))
        ]
        self._recorded_calls = self._calls = calls
        self._device = device

    def outputs(self, hidden_BTD: Tensor) -> Iterator[Tensor]:
        """Yield every block's output."""
        for module, call in zip(self.modules, self._calls[len(hidden_BTD)], strict=True):
            hidden_BTD = call(module, hidden_BTD)
            yield hidden_BTD

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return the last block's output."""
        for output_BTD in self.outputs(hidden_BTD):
            hidden_BTD = output_BTD
        return hidden_BTD

    def fill(self, dtype: torch.dtype, instead: Mapping[str, Tensor]) -> None:
        """Compute with the source's tensors in a dtype, but for some new ones by stored names."""
        self._calls = self._recorded_calls
        for module, prefix in zip(self.modules, self._prefixes, strict=True):
            tensors = read_tensors(module, prefix, self._source, dtype, instead)
            fill(module, tensors, self._device)

    def fill_for_training(self) -> list[dict[str, nn.Parameter]]:
        """Compute in float32 and for autograd.

        Returns:
            What is trained in each block, by names in the model: the parameters of its units, the
            bias of the down projection too. Only they require gradients.
        """
        self._calls = {
            size: [call.for_training() for call in calls]
            for size, calls in self._recorded_calls.items()
        }
        trained = []
        for position, module in enumerate(self.modules):
            prefix = self._prefixes[position]
            tensors = read_tensors(module, prefix, self._source, torch.float32)
            # Copies, because the tensors of a model in memory are its own.
            fill(module, {name: t.clone() for name, t in tensors.items()}, self._device)
            trained.append(self._unit_parameters(position))
            for parameter in trained[-1].values():
                parameter.requires_grad_(True)
        return trained

    def _unit_parameters(self, position: int) -> dict[str, nn.Parameter]:
        prefix = self._prefixes[position]
        names = {
            name
            for unit in self._source.architecture.units_of(self._first + position)
            for name in (*unit.axes, f"{unit.down.removesuffix('weight')}bias")
        }
        return {
            prefix + name: value
            for name, value in self.modules[position].named_parameters()
            if name in names
        }

    def unload(self) -> None:
        """Drop the weights."""
        for module in self.modules:
            unload(module)
