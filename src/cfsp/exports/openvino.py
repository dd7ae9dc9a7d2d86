"""Target `openvino`: an OpenVINO model with its own cache, for OpenVINO GenAI or optimum-intel.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.config_widths import stock_config
from cfsp.checkpoint.loading import compute_dtype
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import text_config_of
from cfsp.checkpoint.writing import copy_travelling_files
from cfsp.errors import CfspError, ExportError, MissingExtraError, UsageError
from cfsp.exports.openvino_model import INSTEAD, convert
from cfsp.exports.target import ExportOptions, Target, Written
from cfsp.exports.verification import (
    GREEDY_STEPS,
    Verification,
    compare_logits,
    greedy_after,
    greedy_by,
    logits_of,
    probe_lengths,
    probe_tokens,
    reference_model,
)
from cfsp.text.tokenizers import load_tokenizer

MODEL_FILE = "openvino_model.xml"
# The folder with the config of the checkpoint, which says the widths.
OWN_CONFIG = "pruned"
_TOLERANCES = {"f32": 1e-4, "f16": 0.02}


def write(source: Checkpoint, out: Path, options: ExportOptions) -> Written:
    """Write the model, its config and tokenizer into an existing directory."""
    _check_expressible(source)
    openvino = _openvino()
    kind = _weight_type(source, options)
    model = _convert(source)
    openvino.save_model(model, out / MODEL_FILE, compress_to_fp16=kind == "f16")
    # Runtimes want to know heads and vocabulary, not widths: the stock config will do.
    config = stock_config(source.config)
    config.architectures = [source.architecture.class_name]
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.to_json_file(out / "config.json")
    # What the model really computes, for `cfsp bench`.
    (out / OWN_CONFIG).mkdir()
    shutil.copy(source.directory / "config.json", out / OWN_CONFIG)
    copy_travelling_files(source.directory, out)
    return Written(f"stateful OpenVINO model in {kind}", tuple(_write_tokenizer(source, out)))


def _check_expressible(source: Checkpoint) -> None:
    """Refuse by name what a traced decoder with a cache of keys and values cannot express."""
    reason = None
    if source.architecture.has_attentions:
        reason = (
            "runtimes expect an attention in every block, with as many KV groups, and this model's "
            "blocks differ there; --to gguf can say it"
        )
    elif source.architecture.has_experts:
        reason = "which experts run depends on the text, and a traced model cannot choose"
    elif text_config_of(source.config) is not source.config:
        reason = "what is traced is a decoder that reads text, and this one reads images too"
    if reason is not None:
        raise ExportError(
            f"openvino export of {source.config.model_type} models is not supported: {reason}; "
            f"{INSTEAD}"
        )


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare logits, and in float32 greedy decoding, with transformers'."""
    openvino = _openvino()
    kind = _weight_type(source, options)
    count, steps = probe_lengths(int(getattr(source.config, "max_position_embeddings", 4096)))
    tokens = probe_tokens(source, count)
    runtime = OpenVinoRuntime(out)
    model = reference_model(source)
    found_TV = runtime.feed(tokens)
    greedy = None
    if kind == "f32":
        runtime.forget()
        found = greedy_by(lambda new: runtime.feed(new)[-1], tokens, min(steps, GREEDY_STEPS))
        greedy = (greedy_after(model, tokens, found), found)
    reader = f"OpenVINO {openvino.get_version().split('-')[0]}"
    return compare_logits(reader, logits_of(model, tokens), found_TV, _TOLERANCES[kind], greedy)


class OpenVinoRuntime:
    """An exported model, compiled for this CPU at full precision, reading one sequence.

    Args:
        directory: what the target wrote.
    """

    def __init__(self, directory: Path) -> None:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        compiled = _openvino().Core().compile_model(directory / MODEL_FILE, "CPU", settings)
        self._request = compiled.create_infer_request()
        self._past = 0

    def forget(self) -> None:
        """Start a new sequence."""
        self._request.reset_state()
        self._past = 0

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read more tokens of the sequence and return logits_TV after each of them."""
        import numpy as np

        end = self._past + len(tokens)
        results = self._request.infer(
            {
                "input_ids": np.array([tokens], dtype=np.int64),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(self._past, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        self._past = end
        return torch.from_numpy(results["logits"][0].copy())


def _convert(source: Checkpoint) -> Any:
    try:
        return convert(reference_model(source), source.architecture.block_count)
    except CfspError:
        raise
    except Exception as error:  # tracing fails in as many ways as there are models
        summary = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"OpenVINO cannot trace {source.architecture.class_name}: {summary[0]}; {INSTEAD}"
        ) from error


def _write_tokenizer(source: Checkpoint, out: Path) -> list[str]:
    """Convert the tokenizer too, which OpenVINO GenAI needs, if its converter is installed."""
    if find_spec("openvino_tokenizers") is None:
        return [
            "openvino-tokenizers is not installed, so the tokenizer stays as it is: optimum-intel "
            "reads it, OpenVINO GenAI needs it converted (convert_tokenizer)"
        ]
    from openvino_tokenizers import convert_tokenizer

    models = convert_tokenizer(load_tokenizer(source.directory), with_detokenizer=True)
    for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
        _openvino().save_model(model, out / f"openvino_{name}.xml")
    return []


def _weight_type(source: Checkpoint, options: ExportOptions) -> str:
    own = "f32" if compute_dtype(source) == torch.float32 else "f16"
    kind = (options.weight_type or own).lower()
    if kind not in _TOLERANCES:
        raise UsageError(
            f"unknown --type {options.weight_type} for openvino; expected f32 or f16 "
            "(quantise further with nncf)"
        )
    return kind


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino export", "openvino") from error
    return openvino


TARGET = Target("openvino", "", write, verify)
