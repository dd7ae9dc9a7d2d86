"""Weight files, their index and the config: damaged, lying, pointing elsewhere."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bad_inputs.catalogue import (
    CALIBRATE,
    EVAL,
    PRUNE_TEXT,
    RECOVER,
    BadInput,
    Place,
    Spoil,
    refusals,
    spoilt,
)
from builders import edit_json, edit_tensors, read_json
from cfsp.checkpoint.own_files import TEMPLATES
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CheckpointError

INSPECT, SHARDED = "inspect {model}", "inspect {sharded}"
EXPORT = "export {model} --to vllm --out {out}"
SAVE, AGAIN = "download or save it again", "again"  # what to do
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
WIDTH = "intermediate_size"
NORM = "model.layers.1.input_layernorm.weight"


def weights(change: Callable[[Path], object]) -> Spoil:
    return lambda place: change(place.model / "model.safetensors")


def tensors(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return weights(lambda path: edit_tensors(path, change))


def config(name: str = "model", **changes: object) -> Spoil:
    return of_config(name, lambda fields: fields.update(changes))


def of_config(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda place: edit_json(getattr(place, name) / "config.json", change)


def width(value: object) -> Spoil:
    """Let the config of the pruned model give FFN widths in the way of models with several."""
    return config("pruned", per_layer_config=None, ffn_widths=value)


def index(data: bytes) -> Spoil:
    return lambda place: (place.sharded / INDEX).write_bytes(data)


def all_in(shard: object) -> Spoil:
    """Let the index say that all tensors are in one shard."""
    return lambda place: edit_json(
        place.sharded / INDEX,
        lambda fields: fields.update(weight_map=dict.fromkeys(fields["weight_map"], shard)),
    )


def shard_elsewhere(place: Place) -> None:
    """Put a shard outside the directory and a link in its place."""
    shard = sorted(place.sharded.glob("model-*.safetensors"))[0]
    elsewhere = place.inputs / "elsewhere.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)


def tokenizer_elsewhere(place: Place) -> None:
    """A file that would be copied into the output is a link to a secret."""
    secret = place.inputs / "secret"
    secret.write_text("secret")
    (place.model / "chat_template.jinja").unlink(missing_ok=True)
    (place.model / "notes.txt").symlink_to(secret)


def templates_elsewhere(*, is_link: bool) -> Spoil:
    """A template that would be copied is a link to a secret; or the folder itself is one."""

    def change(place: Place) -> None:
        secrets, folder = place.inputs / "secrets", place.model / TEMPLATES
        secrets.mkdir()
        (secrets / "tool.jinja").write_text("secret")
        if is_link:
            folder.symlink_to(secrets)
        else:
            (folder / "more").mkdir(parents=True)
            (folder / "more" / "tool.jinja").symlink_to(secrets / "tool.jinja")

    return change


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda found: found.update({name: make(found[name])}))


FILES = [
    BadInput(
        INSPECT,
        "{model}/model.safetensors is no whole safetensors file",
        SAVE,
        weights(lambda path: path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)),
    ),
    *spoilt(
        PRUNE_TEXT,
        "",
        (
            f"block 2 has NaN or infinite values in {UP.format(2)}",
            replace(UP.format(2), lambda t: torch.full_like(t, torch.inf)),
        ),
        (
            "block 1 produced NaN or infinite activations; float32 holds what any sound model",
            tensors(lambda found: found.update({n: found[n] * 1e30 for n in (GATE, UP.format(1))})),
        ),
        (
            f"{GATE} is stored as int8; save the model in float32, bfloat16 or float16",
            replace(GATE, lambda t: t.to(torch.int8)),
        ),
        (
            f"{QUERY} is stored as float8_e4m3fn; save the model in float32, bfloat16 or float16",
            replace(QUERY, lambda t: t.to(torch.float8_e4m3fn)),
        ),
    ),
    BadInput(
        PRUNE_TEXT,
        "q_proj.weight of shape [32, 16], its config asks for [32, 32]",
        SAVE,
        replace("model.layers.0.self_attn.q_proj.weight", lambda t: t[:, :16].clone()),
    ),
    BadInput(
        PRUNE_TEXT,
        "{model} is quantised (fp8) by its config.json, but none of its tensors is",
        "remove quantization_config there",
        config(quantization_config={"quant_method": "fp8"}),
    ),
    *(
        BadInput(
            command, f"{{model}} lacks the tensor {NORM}", SAVE, tensors(lambda t: t.pop(NORM))
        )
        for command in (CALIBRATE, EVAL, EXPORT, RECOVER.replace("pruned", "model"))
    ),
]

INDEXES = [
    *spoilt(
        SHARDED,
        AGAIN,
        (
            f"{INDEX} names a file that is not in its directory: ../elsewhere",
            all_in("../elsewhere"),
        ),
        (f"{INDEX} names a file that is not in its directory: /etc/passwd", all_in("/etc/passwd")),
        (f"{INDEX} names a file that is not in its directory: xxxx", all_in("x" * 5000)),
        (f"{INDEX} is not a checkpoint index", index(b"[" * 100_000)),
    ),
    BadInput(
        "verify {sharded}",
        "a link to a file outside the directory",
        "put the file itself there",
        shard_elsewhere,
    ),
    *spoilt(
        PRUNE_TEXT,
        "put the file itself there",
        ("{model}/notes.txt is a link to a file outside the directory", tokenizer_elsewhere),
        (
            "{model}/additional_chat_templates/more/tool.jinja is a link to a file outside the",
            templates_elsewhere(is_link=False),
        ),
    ),
    BadInput(
        EVAL,
        "{model}/additional_chat_templates is a link to a folder, ",
        "put the folder itself there",
        templates_elsewhere(is_link=True),
    ),
]

CONFIGS = [
    *spoilt(
        INSPECT,
        AGAIN,
        (
            "{model}/config.json is not a model config",
            lambda place: (place.model / "config.json").write_text('{"a":' * 100_000),
        ),
        ("hidden_size is 1", config(hidden_size=10**30)),
        ("intermediate_size is -96", config(intermediate_size=-96)),
    ),
    *spoilt(
        PRUNE_TEXT,
        AGAIN,
        ("num_hidden_layers is 1000000000", config(num_hidden_layers=10**9)),
        ("num_hidden_layers is 2.5", config(num_hidden_layers=2.5)),
        ("architectures is [1], expected names of classes", config(architectures=[1])),
        ("no llama model can be built from the numbers and names in", config(hidden_act="magic")),
    ),
    *spoilt(
        CALIBRATE,
        AGAIN,
        ("num_attention_heads is 0", config(num_attention_heads=0)),
        (
            "{model}/config.json",
            config(num_attention_heads=5, num_key_value_heads=3, head_dim=None),
        ),
    ),
    *spoilt(
        "inspect {pruned}",
        AGAIN,
        (
            "{pruned}/config.json",
            of_config("pruned", lambda f: f["per_layer_config"].update({"999": {WIDTH: 8}})),
        ),
        ("is not a usable llama config: ffn_widths is ", width({"0": 8})),
        ("gives a width for 'moe' of block 0, which the model does", width({"0": {"moe": 8}})),
        ("gives block 0 'x' FFN channels, expected 1 to ", width({"0": {"mlp": "x"}})),
        ("is not a usable llama config: kv_groups is [1, 2]", config("pruned", kv_groups=[1, 2])),
        ("is not a usable llama config: ", config("pruned", num_hidden_layers=[2])),
        ("kv_groups speaks of a block 'x'", config("pruned", kv_groups={"x": {"self_attn": 1}})),
    ),
    BadInput(
        "calibrate {gpt2} --out {out} --data {text} --samples 4 --seqlen 512",
        "{gpt2} can read 256 tokens at once, the windows have 512",
        "give a --seqlen of at most 256",
    ),
]

CASES = FILES + INDEXES + CONFIGS

test_refused = refusals(CASES)


@pytest.mark.parametrize("name", ["a--b", "a--secret"])
def test_links_into_the_cache_of_the_hub_are_followed(place, name):
    """Files of a snapshot are links into the directory of blobs beside it; no other is for it."""
    (place.sharded / TEMPLATES).mkdir()
    (place.sharded / TEMPLATES / "tool.jinja").write_text("tool")
    repository, blobs = place.inputs / "models--a--b", place.inputs / f"models--{name}" / "blobs"
    snapshot = repository / "snapshots" / "0"
    (snapshot / TEMPLATES).mkdir(parents=True)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in place.sharded.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(place.sharded)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    if name != "a--b":
        with pytest.raises(CheckpointError, match="is a link to a file outside the directory"):
            Checkpoint(snapshot)
        return
    assert Checkpoint(snapshot).specs
    assert read_json(snapshot / INDEX)["weight_map"]
