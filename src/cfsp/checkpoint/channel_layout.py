"""Where a stored tensor keeps the channels of its FFN.

A layout is all that surgery, padding and checks need to know of a tensor: no one else asks
which family it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.checkpoint.tensor_file import TensorSpec


@dataclass(frozen=True)
class ChannelLayout:
    """The channel axis of one FFN tensor.

    Attributes:
        unit: index of the FFN unit in the model.
        axis: the axis that channels lie along.
        parts: how many runs of all channels follow each other on that axis: 2 where gate and
            up are one tensor, with all rows of the gate first.
        ffn: index of the FFN in the unit: that of the expert, 0 of a dense one.
    """

    unit: int
    axis: int
    parts: int = 1
    ffn: int = 0

    def width(self, shape: Sequence[int]) -> int:
        """Return the number of channels of a tensor of this shape."""
        return shape[self.axis] // self.parts

    def resized(self, spec: TensorSpec, width: int) -> TensorSpec:
        """Return the spec of the same tensor with another number of channels."""
        return spec.with_length(self.axis, self.parts * width)

    def select(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Return the tensor with the kept channels only, in every part."""
        width = self.width(tensor.shape)
        index = torch.tensor(kept, device=tensor.device)
        index = torch.cat([index + part * width for part in range(self.parts)])
        return tensor.index_select(self.axis, index)

    def pad(self, tensor: Tensor, width: int) -> Tensor:
        """Return the tensor with channels of zeros appended to every part."""
        parts = []
        for part in tensor.chunk(self.parts, dim=self.axis):
            shape = list(part.shape)
            shape[self.axis] = width - part.shape[self.axis]
            parts += [part, part.new_zeros(shape)]
        return torch.cat(parts, dim=self.axis)
