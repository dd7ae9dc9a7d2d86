"""Consecutive blocks of a model as one function of the hidden states.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import read_tensors
from cfsp.checkpoint.skeleton import fill, unload
from cfsp.streaming.block_calls import BlockCall

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime


class BlockGroup:
    """Some blocks of a model, which compute one after the other, called as the model calls them.

    They have no weights before the first `fill` and after `unload`. Calls are by the number of
    windows in a batch.
    """

    def __init__(
        self,
        source: WeightSource,
        modules: nn.ModuleList,
        indices: range,
        calls: Mapping[int, Sequence[BlockCall]],
        runtime: Runtime,
    ) -> None:
        self._source, self._runtime = source, runtime
        self.indices, self.modules = indices, [modules[index] for index in indices]
        self._recorded_calls = self._calls = calls

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

    def fill(self, instead: Mapping[str, Tensor] | None = None) -> None:
        """Compute with the source's tensors, but for some new ones by origin."""
        self._calls = self._recorded_calls
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = self._source.architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, self._runtime.dtype, instead)
            fill(module, tensors, self._runtime.device)

    def fill_for_training(self) -> list[dict[str, nn.Parameter]]:
        """Compute in float32 and for autograd; return what is trained in each block, by names.

        It is the parameters of its units, the bias of the down projection too. Only they require
        gradients.
        """
        self._calls = {
            size: [call.for_training() for call in calls]
            for size, calls in self._recorded_calls.items()
        }
        architecture, trained = self._source.architecture, []
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, torch.float32)
            # Copies, because the tensors of a model in memory are its own.
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            fill(module, copies, self._runtime.device)
            names = {
                name
                for unit in architecture.units_of(index)
                for name in (*unit.axes, f"{unit.down.removesuffix('weight')}bias")
            }
            of_units = {
                prefix + name: parameter
                for name, parameter in module.named_parameters()
                if name in names
            }
            for parameter in of_units.values():
                parameter.requires_grad_(True)
            trained.append(of_units)
        return trained

    def unload(self) -> None:
        """Drop the weights."""
        for module in self.modules:
            unload(module)
