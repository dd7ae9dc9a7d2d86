"""Target `openvino`: an OpenVINO model with its own cache, for OpenVINO GenAI or optimum-intel.

optimum-intel, which makes such models, allows no transformers that reads per-block widths (its
2.2 wants at most 5.5), so the model is made here, with the interface that both expect. It is traced
through transformers' public attention interface: an attention function of ours gets each block's
new keys and values, puts the past ones before them, and hands back what the next call needs.

Shapes: B batch, N heads, T new tokens, S all tokens, H head size, V vocabulary.
"""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp.checkpoint.loading import load, own_dtype
from cfsp.checkpoint.own_files import CONFIG_FILE, copy_travelling_files
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import stock_config
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import CannotSayError, CfspError, MissingExtraError, UsageError, first_line
from cfsp.exports.common import Written, verified

_MODEL_FILE = "openvino_model.xml"
_ATTENTION = "cfsp_keys_and_values_outside"
_TOLERANCES = {"f32": 1e-4, "f16": 0.02}


def check(source: Checkpoint) -> None:
    """Check what can be told of a model without tracing it."""
    if source.architecture.has_attentions:
        raise _unsupported(source, "its blocks differ in KV groups")
    if source.architecture.has_experts:
        raise _unsupported(source, "a traced model cannot choose experts by the text")
    if text_config_of(source.config) is not source.config:
        raise _unsupported(source, "only decoders of text are traced, and this reads images too")
    if "chunked_attention" in (getattr(source.config, "layer_types", None) or ()):
        # Said by the mask alone, which is not used here, and no probe is as long as a chunk.
        raise _unsupported(source, "it attends within chunks")
    rope = getattr(source.config, "rope_parameters", None) or {}
    for each in (rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))):
        if each.get("rope_type") == "dynamic":
            reason = "it scales positions by the length of the text (dynamic), which a trace fixes"
            raise _unsupported(source, reason)


def write(source: Checkpoint, out: Path, weight_type: str | None = None) -> Written:
    """Write the model, its config and tokenizer into an existing directory."""
    check(source)
    own = "f32" if own_dtype(source) == torch.float32 else "f16"
    openvino, kind = _openvino(), str(weight_type or own).lower()
    if kind not in _TOLERANCES:
        raise UsageError(
            f"unknown --type {weight_type} for openvino; expected f32 or f16 "
            "(quantise further with nncf)"
        )
    converted = _converted(source)
    try:
        openvino.save_model(converted, out / _MODEL_FILE, compress_to_fp16=kind == "f16")
    except RuntimeError as error:  # all that it says of a full disk
        raise OSError(errno.EIO, str(error)) from error
    # Runtimes want to know heads and vocabulary, not widths: the stock config will do.
    config = stock_config(source.config)
    config.architectures = [source.architecture.class_name]
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.to_json_file(out / CONFIG_FILE)
    copy_travelling_files(source.directory, out)
    return Written(
        f"stateful OpenVINO model in {kind}",
        lambda: verified(
            source,
            f"OpenVINO {openvino.get_version().split('-')[0]}",
            OpenVinoRuntime(out).feed,
            _TOLERANCES[kind],
            context=int(getattr(source.config, "max_position_embeddings", 4096)),
        ),
        [
            "the tokenizer stays as it is: optimum-intel reads it, GenAI wants it converted by "
            "openvino-tokenizers (convert_tokenizer DIR --with-detokenizer -o DIR)"
        ],
    )


class OpenVinoRuntime:
    """An exported model, compiled for this CPU at full precision, reading one sequence."""

    def __init__(self, directory: Path) -> None:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        compiled = _openvino().Core().compile_model(directory / _MODEL_FILE, "CPU", settings)
        self._request = compiled.create_infer_request()
        self._past = 0

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read more tokens of the sequence and return logits_TV after each of them."""
        start, self._past = self._past, self._past + len(tokens)
        inputs = {
            "input_ids": torch.tensor([list(tokens)]),
            "attention_mask": torch.ones(1, self._past, dtype=torch.int64),
            "position_ids": torch.arange(start, self._past)[None],
            "beam_idx": torch.zeros(1, dtype=torch.int32),
        }
        results = self._request.infer({name: each.numpy() for name, each in inputs.items()})
        return torch.from_numpy(results["logits"][0].copy())


def _unsupported(source: Checkpoint, reason: str) -> CannotSayError:
    return CannotSayError(
        f"openvino export of {source.config.model_type} models is not supported: {reason}"
    )


def _openvino() -> Any:
    try:
        with _unreported():
            import openvino
    except ImportError as error:
        raise MissingExtraError("openvino export", "openvino") from error
    return openvino


@contextmanager
def _unreported() -> Iterator[None]:
    """Keep OpenVINO from reporting what it does to Google Analytics, as it does but for CI.

    It also leaves a number for its user in the home directory, and forks for every event.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        del os.environ["CI"]
        if before is not None:
            os.environ["CI"] = before


class _Step(nn.Module):
    """One call of a model with another attention: new tokens and past in, logits and past out."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import AttentionInterface

        super().__init__()
        self.model = model
        # transformers keeps the function for ever, and must not keep the model.
        this = weakref.proxy(self)
        AttentionInterface.register(
            _ATTENTION, lambda *given, **more: this._attention(*given, **more)
        )
        model.set_attn_implementation(_ATTENTION)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        self.mask_BS, self.past = attention_mask, past
        self.present: list[Tensor] = []
        output: Any = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return (output.logits, *self.present)

    def _attention(
        self, module: nn.Module, query_BNTH: Tensor, *new_BNTH: Any, **how: Any
    ) -> tuple[Tensor, None]:
        """Attend by transformers' arguments: keys, values and a mask that is not used; scaling."""
        from transformers.integrations.sdpa_attention import repeat_kv

        if how.get("s_aux") is not None:
            raise CannotSayError("OpenVINO export has no attention with sinks")
        at, pair = len(self.present), list(new_BNTH[:2])
        if self.past:
            both = zip(self.past[at : at + 2], pair, strict=True)
            pair = [torch.cat(each, dim=2) for each in both]
        self.present += pair
        key, value = (repeat_kv(each, query_BNTH.shape[1] // each.shape[1]) for each in pair)
        bias, scale = self._bias(query_BNTH, how.get("sliding_window")), how.get("scaling")
        if (softcap := how.get("softcap")) is None:
            out_BNTH = nn.functional.scaled_dot_product_attention(
                query_BNTH, key, value, attn_mask=bias, scale=scale
            )
        else:  # Gemma 2 bends the scores
            scale = query_BNTH.shape[-1] ** -0.5 if scale is None else scale
            scores = softcap * torch.tanh(query_BNTH @ key.transpose(2, 3) * (scale / softcap))
            out_BNTH = torch.softmax(scores + bias, dim=-1) @ value
        return out_BNTH.transpose(1, 2), None

    def _bias(self, query_BNTH: Tensor, window: int | None) -> Tensor:
        """Return what is added to the scores: 0 where a token may look, else very little."""
        every_S = torch.arange(self.mask_BS.shape[1])
        new_T = every_S[-query_BNTH.shape[2] :]
        seen_TS = every_S[None, :] <= new_T[:, None]
        if window is not None:
            seen_TS = seen_TS & (every_S[None, :] > new_T[:, None] - window)
        seen = seen_TS[None, None] & self.mask_BS[:, None, None, :].bool()
        nothing = torch.zeros((), dtype=query_BNTH.dtype)
        return torch.where(seen, nothing, torch.finfo(query_BNTH.dtype).min)


def _converted(source: Checkpoint) -> Any:
    """Return the checkpoint as a stateful OpenVINO model in float32."""
    openvino = _openvino()
    model = load(source.directory, dtype=torch.float32)
    step, blocks = _Step(model), source.architecture.block_count
    tokens_BT = torch.ones(2, 3, dtype=torch.int64)
    positions_BT = tokens_BT.cumsum(1) - 1
    with torch.inference_mode(), warnings.catch_warnings():
        # The tracer looks at every attribute of the model, deprecated ones too.
        warnings.simplefilter("ignore")
        try:
            # Without a past first: this tells the heads of each block, and what can't be expressed.
            _, *first = step(tokens_BT, tokens_BT, positions_BT)
            if len(first) != 2 * blocks:
                raise _unsupported(
                    source,
                    f"{len(first) // 2} of its {blocks} blocks use transformers' common "
                    "attention, whose keys and values it can keep",
                )
            past = [torch.zeros(2, each.shape[1], 4, each.shape[3]) for each in first]
            seen_BS = torch.ones(2, 7, dtype=torch.int64)
            example = (tokens_BT, seen_BS, 4 + positions_BT, *past)
            with _unreported():
                converted = openvino.convert_model(step, example_input=example)
        except CfspError:
            raise
        except Exception as error:  # tracing fails in as many ways as there are models
            raise CannotSayError(
                f"OpenVINO cannot trace {source.architecture.class_name}: {first_line(error)}"
            ) from error
    pairs = [f"{kind}.{block}" for block in range(blocks) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_{name}" for name in pairs)]
    outputs = ["logits", *(f"present_{name}" for name in pairs)]
    for port, name in zip(converted.inputs + converted.outputs, inputs + outputs, strict=True):
        port.get_tensor().set_names({name})
    shapes = [[-1, -1]] * 3 + [[-1, each.shape[1], -1, each.shape[3]] for each in past]
    for port, shape in zip(converted.inputs, shapes, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    converted.validate_nodes_and_infer_types()
    _keep_state(converted, pairs)
    return converted


def _keep_state(converted: Any, pairs: list[str]) -> None:
    """Turn the past from inputs and outputs into state, reordered by `beam_idx`."""
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
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = opset13.constant([heads.get_length(), 0, size.get_length()])
            start = opset13.concat([batch, rest], axis=0)
            empty = opset13.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([opset13.broadcast(empty, start)])
    converted.validate_nodes_and_infer_types()
