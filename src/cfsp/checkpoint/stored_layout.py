"""Where a stored tensor keeps the channels of its unit.

A layout is all that surgery and checks need to know of a tensor: no one else asks how
a model stores its FFNs.

Shapes: D hidden, E experts, F channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cfsp.architecture.found import ChannelAxis
from cfsp.checkpoint.tensor_file import TensorSpec

# Which matrix of an FFN, or whose bias; `both` is gate and up in one. Of an attention, `down` is
# its output matrix and `input` all else that has KV groups.
Role = Literal["gate", "up", "both", "down", "input"]


@dataclass(frozen=True)
class ChannelLayout:
    """The channel axis of one stored tensor.

    Attributes:
        unit: index of the unit in the architecture.
        role: which matrix of the FFN it is, or whose bias.
        axis: where the channels are in the stored tensor.
        ffn: index of its FFN in the unit: that of the expert, 0 of a dense one; None if it holds
            all experts of the unit along its first axis.
        is_bias: whether it is a bias.
        transposed: whether a matrix is stored inputs x outputs.
        up_first: whether the up half comes before that of the gate, where both are one.
    """

    unit: int
    role: Role
    axis: ChannelAxis
    ffn: int | None
    is_bias: bool = False
    transposed: bool = False
    up_first: bool = False

    def width(self, shape: Sequence[int]) -> int:
        """Return the number of channels of a tensor of this shape."""
        return self.axis.width(shape)

    def resized(self, spec: TensorSpec, width: int) -> TensorSpec:
        """Return the spec of the same tensor with another number of channels."""
        return spec.with_length(self.axis.axis, self.axis.entries * width)

    def select(self, tensor: Tensor, kept: Sequence[Sequence[int]]) -> Tensor:
        """Return the tensor with the kept channels only.

        Args:
            tensor: as it is stored.
            kept: the channels that each FFN of the unit keeps, equally many of each.
        """
        if self.ffn is not None:
            return self.axis.select(tensor, kept[self.ffn])
        return self.axis.select_of_experts(tensor, kept)

    def matrix(self, tensor: Tensor, role: Role, ffn: int) -> Tensor:
        """Return the matrix of one FFN as outputs x inputs, a view.

        Args:
            tensor: as it is stored; no bias.
            role: which matrix; gate and up are cut out of what holds both.
            ffn: which FFN of the unit.
        """
        matrix = tensor[ffn] if self.ffn is None else tensor
        matrix = matrix.T if self.transposed else matrix
        if self.role != "both" or role == "both":
            return matrix
        part = int((role == "up") != self.up_first)
        if self.axis.fusion == "interleaved":
            return matrix[part::2]
        return matrix.chunk(2)[part]
