"""What is wrong with the tensors of a checkpoint, for a model that they are to make up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cfsp.checkpoint.conversion import (
    Conversion,
    ModelShapes,
    as_saved,
    convert,
    find_conversions,
    meta,
    places,
    saved_state,
)
from cfsp.checkpoint.tensor_file import TensorSpec, specs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def faults_of(
    model: PreTrainedModel,
    shapes: ModelShapes,
    specs: Mapping[str, TensorSpec],
    made_by: Mapping[str, Conversion],
    made: Mapping[str, TensorSpec],
    tied: Mapping[str, str],
) -> dict[str, str]:
    """Return what is wrong with the parameters that the stored tensors do not make up.

    Args:
        model: that they are to make up.
        shapes: of its parameters.
        specs: of the stored tensors.
        made_by: what makes each parameter.
        made: type and shape of each that is made.
        tied: parameters that nothing is stored of.

    Returns:
        Parameter -> what is wrong, as the end of a sentence.
    """
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    faulty = [
        name
        for name, tensor in shapes.tensors.items()
        if name not in tied
        and not (name in made and made[name].shape == tuple(tensor.shape))
        and (name in made or not any(re.search(pattern, name) for pattern in optional))
    ]
    if not faulty:
        return {}
    expected = as_saved(model, {name: shapes.tensors[name] for name in saved_state(model)})
    saved_as = {}
    for conversion in find_conversions(model, expected)[0]:
        for name in specs_made(conversion, specs_of(expected), shapes):
            saved_as[name] = conversion.stored
    faults = {}
    for name in faulty:
        of_this = made_by[name].stored if name in made_by else ()
        faults[name] = f"has no tensors that {name} can be made of"
        if name in made:
            faults[name] = (
                f"has tensors for {name} of shape {list(made[name].shape)}, its config asks for "
                f"{list(shapes.tensors[name].shape)}"
            )
        for stored in (*of_this, *saved_as.get(name, (name,))):
            is_converted = name in made_by and made_by[name].converter is not None
            if stored in specs and stored not in expected and is_converted:
                continue  # one of too many, or stored as it would not be saved now
            wanted = expected.get(stored, shapes.tensors[name])
            if stored not in specs:
                faults[name] = f"lacks the tensor {stored}"
                break
            if specs[stored].shape != tuple(wanted.shape):
                faults[name] = (
                    f"has {stored} of shape {list(specs[stored].shape)}, its config asks for "
                    f"{list(wanted.shape)}"
                )
                break
    return faults


def specs_made(
    conversion: Conversion, specs: Mapping[str, TensorSpec], shapes: ModelShapes
) -> dict[str, TensorSpec]:
    """Return types and shapes of the parameters that a conversion makes; of none if it cannot."""
    placed = places(conversion, specs)
    if placed is not None:
        return {conversion.target: TensorSpec(specs[conversion.stored[0]].dtype, placed[1])}
    try:
        return specs_of(convert(conversion, meta(specs, conversion.stored), shapes))
    except Exception:  # whatever a converter says to shapes that do not fit
        return {}
