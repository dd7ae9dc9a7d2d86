"""Target `openvino`: an OpenVINO model with its own cache, for OpenVINO GenAI or optimum-intel.

optimum-intel, which makes such models, allows no transformers that reads per-block widths (its
2.2 wants at most 5.5), so the model is made here, with the interface that both expect. It is traced
with transformers' own cache and mask.

Shapes: B batch, T new tokens, S all tokens, V vocabulary.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from cfsp.checkpoint.loading import load, own_dtype
from cfsp.checkpoint.own_files import CONFIG_FILE, copy_travelling_files
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import stock_config
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import CannotSayError, MissingExtraError, UsageError, first_line
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
    for kind in getattr(source.config, "layer_types", None) or ():
        if not kind.endswith("attention") or kind == "linear_attention":
            raise _unsupported(source, f"blocks of {kind} keep something else than keys and values")
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
    """One call of a model: new tokens and past keys and values in, logits and present ones out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # Runtimes know this attention. A mask of numbers, not of truth, leaves no row without any.
        AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        # Gemma 2 bends the scores, which it does not.
        bends = getattr(model.config, "attn_logit_softcapping", None)
        does_all = model._supports_sdpa and not bends
        model.set_attn_implementation(_ATTENTION if does_all else "eager")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        # Without its config: in a window the keys and values of all tokens stay, the mask hides.
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        output: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        return (output.logits, *present)


def _converted(source: Checkpoint) -> Any:
    """Return the checkpoint as a stateful OpenVINO model in float32."""
    openvino = _openvino()
    step = _Step(load(source.directory, dtype=torch.float32))
    tokens_BT = torch.ones(2, 3, dtype=torch.int64)
    positions_BT = tokens_BT.cumsum(1) - 1
    with torch.inference_mode(), warnings.catch_warnings():
        # The tracer looks at every attribute of the model, deprecated ones too.
        warnings.simplefilter("ignore")
        try:
            # Without a past first: this tells the heads of each block.
            _, *first = step(tokens_BT, tokens_BT, positions_BT)
            past = [torch.zeros(2, each.shape[1], 4, each.shape[3]) for each in first]
            seen_BS = torch.ones(2, 7, dtype=torch.int64)
            example = (tokens_BT, seen_BS, 4 + positions_BT, *past)
            with _unreported():
                converted = openvino.convert_model(step, example_input=example)
        except Exception as error:  # tracing fails in as many ways as there are models
            raise CannotSayError(
                f"OpenVINO cannot trace {source.architecture.class_name}: {first_line(error)}"
            ) from error
    pairs = [f"{kind}.{block}" for block in range(len(past) // 2) for kind in ("key", "value")]
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
