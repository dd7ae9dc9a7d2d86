"""Models without weights, into which single tensors are put when they are needed."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.checkpoint.expert_tensors import Piece, assemble, pieces
from cfsp.checkpoint.families import Family, family_of, intermediate_sizes
from cfsp.checkpoint.modeling_code import pruned_class
from cfsp.checkpoint.tensor_file import AGAIN
from cfsp.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cfsp.architecture.found import Architecture
    from cfsp.checkpoint.reading import WeightSource


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal LM class of a config: stock, or ours for what stock cannot build."""
    import transformers

    family = family_of(config)
    if len(set(intermediate_sizes(config))) > 1:
        return pruned_class(family)
    return getattr(transformers, family.causal_lm)  # type: ignore[no-any-return]


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a config with parameters on the meta device and real buffers.

    Real buffers matter: rotary frequencies are computed at construction and stored nowhere.
    """
    from accelerate import init_empty_weights

    build: Any = model_class(config)
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = build._from_config(config, dtype=dtype)
    except Exception as error:  # whatever a config's numbers and names make transformers do
        raise CheckpointError(
            f"no {config.model_type} model can be built from the numbers and names in config.json "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}); "
            "correct it or download it again"
        ) from error
    return model.eval()


def blocks_of(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """Return the list of decoder blocks of a model."""
    blocks = attrgetter(architecture.blocks)(model)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def projection_of(block: nn.Module, family: Family, matrix: str) -> nn.Module:
    """Return the module of one FFN matrix (one of `family.matrices`) of a decoder block.

    Experts have no such modules.
    """
    projection = attrgetter(family.path_in_block(matrix))(block)
    assert isinstance(projection, nn.Module)
    return projection


def read_tensors(
    module: nn.Module, prefix: str, source: WeightSource, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read the tensors of a module from the source, by their names in the module.

    Touches nothing but the file, so that a thread can read ahead.

    Args:
        module: any part of a skeleton.
        prefix: what the module's parameter names begin with in the source.
        source: where the tensors come from.
        dtype: what floating-point tensors become.

    Raises:
        CheckpointError: the source lacks a tensor or has it in another shape.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        parts = _stored_parts(source, prefix + name, parameter)
        tensors[name] = assemble(
            parts, parameter.shape, lambda stored: source.read(stored).to(dtype)
        )
    return tensors


# gpt_neox's files call its head by the old name, which transformers knows.
_HEAD, _OLD_HEAD = "lm_head.weight", "embed_out.weight"


def check_complete(source: WeightSource) -> None:
    """Check that a model's file has every tensor of the model, in its shape.

    Loading makes up what is missing, by chance; cutting does not look at what it does not cut.

    Raises:
        CheckpointError: the source lacks a tensor or has it in another shape.
    """
    model = build_skeleton(source.config, torch.float32)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, parameter in model.named_parameters():
        if name in tied or (name == _HEAD and _OLD_HEAD in source.specs):
            continue
        _stored_parts(source, name, parameter)


def fill_head(
    model: PreTrainedModel, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill all of a skeleton but its decoder blocks, and its embeddings unless the head is tied.

    Raises:
        CheckpointError: the source lacks a tensor or has it in another shape.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    blocks = f"{source.architecture.blocks}."
    embedding = model.get_input_embeddings().weight
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter is embedding and name not in tied.values():
            continue
        if not name.startswith(blocks) and name not in tied:
            old = name == _HEAD and _OLD_HEAD in source.specs
            part = _stored_parts(source, _OLD_HEAD if old else name, parameter)[0]
            tensors[name] = source.read(part.name).to(dtype)
    tensors |= {name: tensors[other] for name, other in tied.items()}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    model.tie_weights()


def _stored_parts(source: WeightSource, name: str, parameter: torch.Tensor) -> list[Piece]:
    """Return what a checkpoint stores of a parameter, after checking that it is there."""
    parts = pieces(source.family, name, parameter.shape)
    for part in parts:
        spec = source.specs.get(part.name)
        if spec is None:
            raise CheckpointError(f"{source.label} lacks the tensor {part.name}; {AGAIN}")
        expected = parameter[part.place].shape if part.place else parameter.shape
        if spec.shape != tuple(expected):
            raise CheckpointError(
                f"{source.label}: {part.name} has shape {list(spec.shape)}, "
                f"its config asks for {list(expected)}; {AGAIN}"
            )
    return parts


def fill(module: nn.Module, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Make tensors the parameters of a module, on a device; the dictionary is emptied."""
    for name in list(tensors):
        # One at a time: on another device each would otherwise be there twice.
        moved = {name: tensors.pop(name).to(device)}
        module.load_state_dict(moved, strict=False, assign=True)
    module.requires_grad_(False)
    module.to(device)


def unload(module: nn.Module) -> None:
    """Drop a module's parameters, keeping their shapes and its buffers."""
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            setattr(submodule, name, empty)
