"""Finding the blocks of a model and their units, by looking at its modules.

The model may be on the meta device: only shapes and names of attributes count. What is found is a
guess, which `cfsp.architecture.proof` proves or refuses.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cfsp.architecture.attentions import attentions_of
from cfsp.architecture.ffns import ffns_of
from cfsp.architecture.found import Architecture, Refusal, Unit
from cfsp.errors import UnsupportedModelError
from cfsp.settings import Part


def find_architecture(model: PreTrainedModel, part: Part = "ffn") -> Architecture:
    """Return the blocks of a model and the units of a part that they seem to have.

    With the part `attention` there are also attentions that can only go whole.
    """
    decoder: nn.Module = model.get_decoder()
    # Some call their output matrix `decoder`.
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model.base_model
    base = next(path for path, module in model.named_modules() if module is decoder)
    text_config: Any = model.config.get_text_config(decoder=True)
    hidden = _first_number(text_config, "hidden_size", "d_model", "n_embd", "dim")
    layers = _first_number(text_config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if hidden is None:
        raise UnsupportedModelError(
            f"the config of model type {text_config.model_type!r} names no hidden_size; "
            "please report the model type"
        )
    candidates: list[tuple[str, nn.ModuleList, list[Unit | Refusal]]] = []
    for path, blocks in decoder.named_modules():
        inside = tuple(f"{outer}." for outer, *_ in candidates)
        if not isinstance(blocks, nn.ModuleList) or path.startswith(inside):
            continue
        found = []
        for index, block in enumerate(blocks):
            if part == "ffn":
                found += ffns_of(block, index, hidden)
            else:
                found += attentions_of(block, index, hidden, text_config, part)
        candidates.append((path, blocks, found))
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks that cfsp could find; expected "
            "a ModuleList in its text decoder; please report the model type"
        )

    def likelihood(candidate: tuple[str, nn.ModuleList, list[Unit | Refusal]]) -> Any:
        _path, blocks, found = candidate
        has_units = any(isinstance(unit, Unit) for unit in found)
        return len(blocks) == layers, has_units, len(blocks)

    path, blocks, found = max(candidates, key=likelihood)
    path = f"{base}.{path}" if base else path
    refused = [
        Refusal(f"{path}.{refusal.module}", refusal.reason)
        for refusal in found
        if isinstance(refusal, Refusal)
    ]
    return Architecture(
        class_name=type(model).__name__,
        decoder=_innermost_model(model, path),
        blocks=path,
        block_count=len(blocks),
        units=tuple(unit for unit in found if isinstance(unit, Unit)),
        refused=tuple(refused),
        learnt_positions=_learnt_positions(decoder, text_config),
    )


def _innermost_model(model: PreTrainedModel, blocks: str) -> str:
    """Return the path to the module that takes token ids and calls the blocks."""
    path = blocks
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            break
    return path


def _learnt_positions(decoder: nn.Module, text_config: Any) -> int | None:
    """Return the longest input if there is a table with a row for each of its positions."""
    longest = getattr(text_config, "max_position_embeddings", None)
    # Some tables begin with rows for padding.
    lengths = range(longest, longest + 4) if isinstance(longest, int) else ()
    for name, module in decoder.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings in lengths
        if is_table and ("pos" in name or "wpe" in name):
            return longest
    return None


def _first_number(text_config: Any, *keys: str) -> int | None:
    values = (getattr(text_config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), None)
