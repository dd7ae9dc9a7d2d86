"""The part of a model after its last block: norm, head, scaling and soft-capping of logits.

The model's own forward runs with its blocks left out. Only what this part computes with has to
have weights: of a multimodal model not the vision tower, and no embeddings but a tied one.

Shapes: P positions of any windows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp.architecture.small_run import set_parameter
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import architecture_of, blocks_of, build_skeleton
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.streaming.stand_in import CallForm, find_call_form, resumed_at

# What else a config can ask for. It is collected from all blocks, and one that does not run gives
# none: mixtures of experts that were fine-tuned often ask for router logits.
_MORE = ("output_router_logits", "output_hidden_states", "output_attentions")


def logits_of(model: Any, tokens_BT: Tensor, **how: Any) -> Tensor:
    """Return the logits of a model, or of a part that gives logits, and have nothing else made."""
    config = model.config
    configs = (config, *(getattr(config, name, None) for name in config.sub_configs))
    asked = [(each, name) for each in configs for name in _MORE if getattr(each, name, False)]
    for each, name in asked:
        setattr(each, name, False)
    try:
        logits: Tensor = model(input_ids=tokens_BT, use_cache=False, **how).logits
    finally:
        for each, name in asked:
            setattr(each, name, True)
    return logits


def end_of(model: nn.Module, decoder: str) -> str:
    """Return the path to the innermost module that has both a head and the decoder at a path."""
    path = decoder
    while path:
        path = path.rpartition(".")[0]
        embeddings = getattr(model.get_submodule(path), "get_output_embeddings", None)
        if embeddings is not None and embeddings() is not None:
            return path
    return ""


def text_model(model: PreTrainedModel) -> Any:
    """Return the innermost part of a model that gives logits: of most it is the model itself."""
    return model.get_submodule(end_of(model, architecture_of(model.config).decoder))


def parameters_of_end(model: nn.Module, decoder: str, blocks: str) -> Iterator[str]:
    """Yield the names of the parameters that the end of a model computes with.

    A head that is tied to the embeddings has its own name, which no file may have. `decoder` is the
    path to the module whose forward calls the blocks, `blocks` that to their list inside it.
    """
    end = end_of(model, decoder)
    above = f"{end}." if end else ""
    # Such as a vision tower: beside the decoder, but inside the model without its head.
    inner = decoder.removeprefix(above).partition(".")[0]
    embedded = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    for name, _parameter in model.named_parameters(remove_duplicate=False):
        outside = not name.startswith(above)
        beside = name.startswith(f"{above}{inner}.") and not name.startswith(f"{decoder}.")
        if not (outside or beside or name.startswith(f"{blocks}.") or name in embedded):
            yield name


class Head:
    """All of a model that comes after its last block, read from a source; `vocabulary` is V.

    What this part does not compute with becomes zeros, which take no memory: which tokens came does
    not matter after the blocks. Some models ask their first parameter for the device, so that none
    may be left without one.
    """

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        found = source.architecture
        model = build_skeleton(source.config, dtype)
        for name in list(parameters_of_end(model, found.decoder, found.blocks)):
            tensor = source.parameter(name, dtype).to(device)
            set_parameter(model, name, nn.Parameter(tensor, requires_grad=False))
        self._blocks = blocks_of(model, found)
        self._model: Any = model.get_submodule(end_of(model, found.decoder))
        self._device, self._dtype = device, dtype
        self.vocabulary = vocabulary_of(source.config)
        of_blocks = {id(parameter) for parameter in self._blocks.parameters()}
        for module in self._model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta and id(parameter) not in of_blocks:
                    zeros = torch.zeros((), dtype=parameter.dtype, device=device)
                    zeros = zeros.expand(parameter.shape)
                    setattr(module, name, nn.Parameter(zeros, requires_grad=False))

    @cached_property
    def _form(self) -> CallForm:
        return find_call_form(partial(logits_of, self._model), self._blocks, self._device)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Return the logits of the tokens that follow, PV."""
        # Nothing after the blocks looks at other positions, so each is a window of its own.
        hidden = self._form.unpack(hidden_PD.to(self._dtype).unsqueeze(1))
        # Which tokens they are does not matter any more.
        tokens_P1 = torch.zeros(len(hidden_PD), 1, dtype=torch.long, device=self._device)
        with resumed_at(self._blocks, len(self._blocks), hidden, self._form):
            return logits_of(self._model, tokens_P1)[:, 0]
