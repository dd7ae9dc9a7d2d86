"""Widths in a config: what is written is what is found again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedConfig

from builders import edit_json
from cfsp.checkpoint.config_file import read_config
from cfsp.checkpoint.pruned_config import config_changes
from cfsp.checkpoint.skeleton import architecture_of
from tiny_decoders import tiny_config


def written_and_read(
    config: PreTrainedConfig,
    widths: list[int],
    directory: Path,
    older: Callable[[dict[str, Any]], object] = len,
    removed: tuple[int, ...] = (),
) -> tuple[dict[str, Any], PreTrainedConfig]:
    """Return config.json of a model with other widths or fewer blocks, and what it is read as.

    What is read before may be made what another version wrote.
    """
    config.save_pretrained(directory)
    edit_json(directory / "config.json", older)
    before, _ = read_config(directory)
    architecture = architecture_of(before)
    source: Any = SimpleNamespace(directory=directory, config=before, architecture=architecture)
    config_changes(before, architecture, widths, removed).write(source, directory)
    return json.loads((directory / "config.json").read_text()), read_config(directory)[0]


@pytest.mark.parametrize("widths", [[88, 96, 64], [64, 64, 64]])
def test_what_a_stock_config_says_of_single_blocks_stays(widths, tmp_path):
    config = tiny_config("gemma4_text")
    heads = config.to_dict()["per_layer_config"]
    assert heads
    fields, found = written_and_read(config, widths, tmp_path)
    assert fields["per_layer_config"] == heads
    assert architecture_of(found).widths == widths
    in_memory = config_changes(config, architecture_of(config), widths).applied_to(config)
    assert architecture_of(in_memory).widths == widths
    assert in_memory.to_dict()["per_layer_config"] == heads


@pytest.mark.parametrize("widths", [[88, 96, 64], [64, 64, 64]])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "paddleocr_vl"])
def test_a_decoder_that_stands_at_the_top_of_a_config_stays_as_it_is(name, widths, tmp_path):
    """As Qwen2.5-VL was published."""

    def flatten(fields: dict[str, Any]) -> None:
        text = fields.pop("text_config")
        del text["model_type"]
        fields |= {**text, **fields}

    config = tiny_config(name)
    own = config.get_text_config(decoder=True)
    own.rms_norm_eps = 0.003  # no class has it from the start
    fields, found = written_and_read(config, widths, tmp_path, flatten)
    assert architecture_of(found).widths == widths
    # mlx-vlm reads what stands at the top, whatever the config inside says.
    assert fields["intermediate_size"] == (64 if len({*widths}) == 1 else own.intermediate_size)
    text, expected = found.get_text_config(decoder=True).to_dict(), own.to_dict()
    differ = {key for key in expected if text[key] != expected[key]}
    assert differ <= {"intermediate_size", "architectures", "dtype"}


def test_an_older_key_does_not_go_before_todays(tmp_path):
    """The class of LFM2 takes it out when it reads a config."""

    def rename(fields: dict[str, Any]) -> None:
        fields["block_ff_dim"] = fields.pop("intermediate_size")

    config = tiny_config("lfm2", block_auto_adjust_ff_dim=False)
    fields, found = written_and_read(config, [48, 48, 48], tmp_path, rename)
    assert architecture_of(found).widths == [48, 48, 48]
    assert fields["intermediate_size"] == 48 and "block_ff_dim" not in fields


def test_an_older_key_that_other_software_reads_says_what_todays_says(tmp_path):
    """Nemotron-H was published with a pattern of its blocks."""

    def rename(fields: dict[str, Any]) -> None:
        del fields["layers_block_type"]
        fields |= {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4}

    fields, found = written_and_read(
        tiny_config("nemotron_h"), [64, 96, 96], tmp_path, rename, (0,)
    )
    assert found.layers_block_type == ["moe", "full_attention", "mlp"]
    assert (fields["hybrid_override_pattern"], fields["num_hidden_layers"]) == ("E*-", 3)


def test_kinds_of_blocks_are_called_as_they_were(tmp_path):
    """Granite 4 was published with names that mlx-lm and llama.cpp read, and no others."""
    kinds = ["mamba", "attention", "mamba"]
    config = tiny_config("granitemoehybrid", layer_types=kinds)
    widths = architecture_of(config).without_blocks((0,)).widths
    fields, found = written_and_read(
        config, widths, tmp_path, lambda fields: fields.update(layer_types=kinds), (0,)
    )
    assert fields["layer_types"] == kinds[1:]
    assert found.layer_types == ["full_attention", "linear_attention"]


def test_a_table_of_more_than_ten_blocks_is_renumbered(tmp_path):
    """As of Gemma 4, whose blocks of full attention have other heads, by keys such as `05`."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 12, "hidden_size_per_layer_input": 0}
    config = tiny_config("gemma4_text", layer_types=4 * kinds, **sizes)
    widths = architecture_of(config).without_blocks((3,)).widths
    fields, _ = written_and_read(config, widths, tmp_path, removed=(3,))
    assert list(fields["per_layer_config"]) == ["02", "04", "07", "10"]


def test_an_older_list_of_blocks_is_read_as_it_was(tmp_path):
    """Step 3.7 was published with a base of rotary embeddings for each block."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]

    def rename(fields: dict[str, Any]) -> None:
        del fields["text_config"]["rope_parameters"]
        fields["text_config"]["rope_theta"] = [5e6, 1e4, 5e6]

    config = tiny_config("step3p7", text_config={"layer_types": kinds, "pad_token_id": 2})
    widths = architecture_of(config).without_blocks((0,)).widths
    _, found = written_and_read(config, widths, tmp_path, rename, (0,))
    bases = found.text_config.rope_parameters
    assert {kind: bases[kind]["rope_theta"] for kind in kinds} == {kinds[0]: 5e6, kinds[1]: 1e4}


@pytest.mark.parametrize("name", ["llama", "jamba", "phimoe", "gpt_bigcode"])
def test_equal_widths_are_a_stock_config(name, tmp_path):
    config = tiny_config(name)
    equal = [16] * len(architecture_of(config).units)
    fields, found = written_and_read(config, equal, tmp_path)
    assert not {"ffn_widths", "per_layer_config", "auto_map"} & fields.keys()
    assert architecture_of(found).widths == equal


@pytest.mark.parametrize("widths", [[8, 8, 8], [8, 12, 8]])
def test_ffns_that_nobody_would_take_for_one_are_found_again(widths, tmp_path):
    config = tiny_config("opt")
    assert 2 * max(widths) < config.hidden_size
    _, found = written_and_read(config, widths, tmp_path)
    assert architecture_of(found).widths == widths
