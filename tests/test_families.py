"""The family contract, once for every tiny model."""

from __future__ import annotations

import pytest
from transformers import BertConfig

from cfsp.channel_layout import ChannelLayout
from cfsp.errors import UnsupportedModelError
from cfsp.families import FAMILIES, family_of, family_of_type
from family_contract import FamilyContract
from tiny_models import TINY_CONFIGS


def _contract(name: str) -> type[FamilyContract]:
    class_name = "Test" + "".join(part.capitalize() for part in name.split("-"))
    return type(class_name, (FamilyContract,), {"name": name, "__module__": __name__})


for _name in TINY_CONFIGS:
    _class = _contract(_name)
    globals()[_class.__name__] = _class
del _class


def test_every_family_has_a_tiny_model() -> None:
    assert {config().model_type for config in TINY_CONFIGS.values()} == set(FAMILIES)


def test_unknown_family_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(BertConfig())
    assert "'bert'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_layout_knows_weights_biases_and_nothing_else() -> None:
    family = family_of_type("llama")
    assert family.layout_of("model.layers.12.mlp.gate_proj.weight") == ChannelLayout(12, 0)
    assert family.layout_of("model.layers.12.mlp.up_proj.bias") == ChannelLayout(12, 0)
    assert family.layout_of("model.layers.12.mlp.down_proj.weight") == ChannelLayout(12, 1)
    # Its length is the hidden size.
    assert family.layout_of("model.layers.12.mlp.down_proj.bias") is None
    assert family.layout_of("model.layers.12.self_attn.q_proj.weight") is None
    assert family.layout_of("prefix.model.layers.1.mlp.up_proj.weight") is None
