"""A pruned model built from one in memory, without going through files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.skeleton import PRUNED_KEY, build_skeleton
from cfsp.cut.surgery import PrunedSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import LoadedModel
    from cfsp.checkpoint.tensor_file import FileTensor
    from cfsp.planning.plan_file import PruningPlan


def build_pruned_model(
    model: PreTrainedModel,
    source: LoadedModel,
    plan: PruningPlan,
    repaired: Mapping[str, FileTensor],
    facts: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the pruned model that a plan describes.

    `in_features` and `out_features` are right, so PEFT attaches; `save_pretrained` writes what
    `cfsp prune` writes but for the files that only cfsp reads. What `cfsp inspect` tells of those
    (`facts`, as JSON types) travels in the config, as `cfsp`.

    Args:
        model: the original; stays as it is and shares its unpruned tensors.
        source: the same model as a weight source.
        plan: which channels stay.
        repaired: parameters that repair changed, by their origin, in pruned shape.
        facts: how it was pruned; None to say nothing of it.
    """
    smaller = PrunedSource(source, plan, repaired)
    config = smaller.config
    if facts is not None:
        setattr(config, PRUNED_KEY, facts)
    pruned = build_skeleton(config, model.dtype)
    tensors = {
        name: smaller.parameter(name)
        for name in pruned.state_dict()
        if name in smaller.parameters  # tied weights are not
    }
    pruned.load_state_dict(tensors, strict=False, assign=True)
    pruned.tie_weights()
    still_empty = [name for name, p in pruned.named_parameters() if p.is_meta]
    assert not still_empty, still_empty
    pruned.to(model.device)
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned
