"""What an expert owns, and what stored tensors of experts are called when some are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cfsp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.checkpoint.stored_layout import ChannelLayout


def names_without_experts(
    source: WeightSource, kept: Mapping[int, Sequence[int]], names: Mapping[str, str]
) -> dict[str, str]:
    """Return the new names of the stored tensors that stay when some experts go.

    The number of a tensor's expert is that part of its name between dots that is the expert's in
    the tensors of all experts.

    Args:
        source: the model.
        kept: unit -> the experts that stay, of every unit that loses some.
        names: what the stored tensors are called that stay if no expert goes, by their names.

    Raises:
        UnsupportedModelError: the name of a tensor has no number that is its expert's.
    """
    if not kept:
        return dict(names)
    layouts = source.stored.layouts
    of_kind: dict[tuple[object, ...], list[str]] = {}
    for name, layout in layouts.items():
        if layout.unit in kept and layout.ffn is not None:
            kind = (layout.unit, layout.role, layout.is_bias)
            of_kind.setdefault(kind, []).append(name)
    place_of = {
        name: place
        for alike in of_kind.values()
        for place in [_place_of_number(source, alike, layouts)]
        for name in alike
    }
    gone = source.stored.of_gone_experts(kept)
    renamed = {}
    for name, new in names.items():
        if name in gone:
            continue
        if name in place_of:
            layout = layouts[name]
            parts = new.split(".")
            parts[place_of[name]] = str(list(kept[layout.unit]).index(layout.ffn or 0))
            new = ".".join(parts)
        renamed[name] = new
    return renamed


def parameters_of_an_expert(source: WeightSource) -> dict[int, int]:
    """Return how many parameters go with one expert, its part of the router included, by block."""
    units = source.units
    of_all = {index: 0 for index, unit in enumerate(units) if unit.expert_axes}
    for name, spec in source.specs.items():
        layout = source.layout_of(name)
        routed, _ = source.stored.expert_axes.get(name, (None, 0))
        index = routed if layout is None else layout.unit
        if index in of_all:
            of_all[index] += spec.elements
    return {units[index].block: owned // units[index].ffns for index, owned in of_all.items()}


def _place_of_number(
    source: WeightSource, alike: Sequence[str], layouts: Mapping[str, ChannelLayout]
) -> int:
    """Return which part of the names of the same matrix of all experts is the expert's number."""
    split = {name: name.split(".") for name in alike}
    places = [
        place
        for place in range(min(map(len, split.values())))
        if all(parts[place] == str(layouts[name].ffn) for name, parts in split.items())
    ]
    if len(places) != 1:
        raise UnsupportedModelError(
            f"{source.label} stores {alike[0]} of one expert under a name without its number, so "
            "that no expert can be removed"
        )
    return places[0]
