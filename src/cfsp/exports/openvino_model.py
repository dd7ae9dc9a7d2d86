"""A causal LM as an OpenVINO model that keeps its keys and values itself.

optimum-intel, which makes such models, allows no transformers that reads per-block widths (its
2.2 wants at most 5.5), so the model is made here, with the interface that its runtime and
OpenVINO GenAI expect: inputs `input_ids`, `attention_mask`, `position_ids` and `beam_idx`,
output `logits`, and the cache as state.

The model is traced through transformers' public attention interface: an attention function of
ours gets each block's new keys and values, puts the past ones before them, and hands back what
the next call needs. No cache class and no mask code of transformers takes part.

Shapes: B batch, N heads, T new tokens, S all tokens, H head size.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.errors import ExportError

if TYPE_CHECKING:
    import openvino
    from transformers import PreTrainedModel

_ATTENTION = "cfsp_keys_and_values_outside"
# Where a model cannot be converted.
INSTEAD = "transformers runs the checkpoint itself"
INPUTS = ("input_ids", "attention_mask", "position_ids")


class _Attention:
    """What transformers calls in every block, with past and present of all blocks."""

    def __init__(self) -> None:
        self.mask_BS: Tensor | None = None
        self.past: list[tuple[Tensor, Tensor]] = []
        self.present: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        module: nn.Module,
        query_BNTH: Tensor,
        key_BNTH: Tensor,
        value_BNTH: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if s_aux is not None:
            raise ExportError(f"OpenVINO export has no attention with sinks; {INSTEAD}")
        key_BNSH, value_BNSH = key_BNTH, value_BNTH
        if self.past:
            past_key, past_value = self.past[len(self.present)]
            key_BNSH = torch.cat([past_key, key_BNTH], dim=2)
            value_BNSH = torch.cat([past_value, value_BNTH], dim=2)
        self.present.append((key_BNSH, value_BNSH))
        groups = query_BNTH.shape[1] // key_BNTH.shape[1]
        out_BNTH = _attend(
            query_BNTH,
            _repeated(key_BNSH, groups),
            _repeated(value_BNSH, groups),
            self._bias(query_BNTH, sliding_window),
            scaling,
            softcap,
        )
        return out_BNTH.transpose(1, 2), None

    def _bias(self, query_BNTH: Tensor, window: int | None) -> Tensor:
        """Return what is added to the scores: 0 where a token may look, else very little."""
        assert self.mask_BS is not None
        every_S = torch.arange(self.mask_BS.shape[1])
        new_T = every_S[-query_BNTH.shape[2] :]
        seen_TS = every_S[None, :] <= new_T[:, None]
        if window is not None:
            seen_TS = seen_TS & (every_S[None, :] > new_T[:, None] - window)
        seen = seen_TS[None, None] & self.mask_BS[:, None, None, :].bool()
        nothing = torch.zeros((), dtype=query_BNTH.dtype)
        return torch.where(seen, nothing, torch.finfo(query_BNTH.dtype).min)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Return the attention's output; scores beyond `softcap` are bent (Gemma 2), if given."""
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    return torch.softmax(scores + bias, dim=-1) @ value


def _repeated(heads_BNSH: Tensor, groups: int) -> Tensor:
    batch, heads, length, size = heads_BNSH.shape
    expanded = heads_BNSH[:, :, None].expand(batch, heads, groups, length, size)
    return expanded.reshape(batch, heads * groups, length, size)


class _Step(nn.Module):
    """One call: new tokens and the past in, logits and the new past out."""

    def __init__(self, model: PreTrainedModel, attention: _Attention) -> None:
        super().__init__()
        self.model = model
        self.attention = attention

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        self.attention.mask_BS = attention_mask
        self.attention.past = list(zip(past[::2], past[1::2], strict=True))
        self.attention.present = []
        output: Any = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return (output.logits, *(t for pair in self.attention.present for t in pair))


def convert(model: PreTrainedModel, blocks: int) -> openvino.Model:
    """Return a stateful OpenVINO model of a causal LM in float32.

    The attention function of the given model is replaced.

    Args:
        model: the causal LM.
        blocks: how many it has.

    Raises:
        ExportError: the model's attention has something that this one lacks.
    """
    import openvino
    from transformers import AttentionInterface

    attention = _Attention()
    AttentionInterface.register(_ATTENTION, attention)
    model.set_attn_implementation(_ATTENTION)
    step = _Step(model, attention)
    tokens_BT = torch.ones(2, 3, dtype=torch.int64)
    positions_BT = tokens_BT.cumsum(1) - 1
    with torch.inference_mode(), warnings.catch_warnings():
        # The tracer looks at every attribute of the model, deprecated ones too.
        warnings.simplefilter("ignore")
        # Without a past first: this tells the heads of each block, and what it can't express.
        _, *first = step(tokens_BT, torch.ones(2, 3, dtype=torch.int64), positions_BT)
        if len(first) != 2 * blocks:
            raise ExportError(
                f"openvino export of {model.config.model_type} models is not supported: "
                f"{len(first) // 2} of its {blocks} blocks use transformers' common attention, "
                f"whose keys and values it can keep; {INSTEAD}"
            )
        past = [torch.zeros(2, t.shape[1], 4, t.shape[3]) for t in first]
        seen_BS = torch.ones(2, 7, dtype=torch.int64)
        example = (tokens_BT, seen_BS, 4 + positions_BT, *past)
        converted: openvino.Model = openvino.convert_model(step, example_input=example)
    pairs = [f"{kind}.{i}" for i in range(len(past) // 2) for kind in ("key", "value")]
    _name_ports(converted, pairs, [(t.shape[1], t.shape[3]) for t in past])
    _keep_state(converted, pairs)
    return converted


def _name_ports(
    converted: openvino.Model, pairs: list[str], heads_and_sizes: list[tuple[int, int]]
) -> None:
    """Give inputs and outputs their names, and leave batch and lengths open."""
    import openvino

    shapes = [[-1, -1]] * len(INPUTS) + [[-1, heads, -1, size] for heads, size in heads_and_sizes]
    names = [*INPUTS, *(f"past_{name}" for name in pairs)]
    for port, name, shape in zip(converted.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    outputs = ["logits", *(f"present_{name}" for name in pairs)]
    for port, name in zip(converted.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    converted.validate_nodes_and_infer_types()


def _keep_state(converted: openvino.Model, pairs: list[str]) -> None:
    """Turn the past from inputs and outputs into state, reordered by `beam_idx`."""
    import numpy as np
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = opset13.parameter([-1], dtype=openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    converted.add_parameters([beams])
    zero = opset13.constant(0)
    for name in pairs:
        port = converted.input(f"past_{name}")
        readers = port.get_target_inputs()
        chosen = opset13.gather(port, beams, zero)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    apply_make_stateful_transformation(
        converted, {f"past_{name}": f"present_{name}" for name in pairs}
    )
    # A state begins with as many rows as the batch has, and no token.
    shape = opset13.shape_of(converted.input("input_ids"), output_type="i64")
    batch = opset13.gather(shape, opset13.constant([0]), zero)
    for node in converted.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        _, heads, _, size = node.get_output_partial_shape(0)
        rest = np.array([heads.get_length(), 0, size.get_length()], dtype=np.int64)
        start = opset13.concat([batch, opset13.constant(rest)], axis=0)
        empty = opset13.constant(0.0, dtype=node.get_output_element_type(0))
        node.set_arguments([opset13.broadcast(empty, start)])
    converted.validate_nodes_and_infer_types()
