"""Weight files, their index and the config: damaged, lying, pointing elsewhere."""

from __future__ import annotations

import json
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
    BadInput,
    Place,
    Table,
    cut,
    edit_header,
    edit_json,
    edit_tensors,
)
from cfsp.checkpoint.links import TEMPLATES
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CheckpointError

INSPECT, SHARDED = "inspect {model}", "inspect {sharded}"
EXPORT = "export {model} --to vllm --out {out}"
# What to do.
SAVE, AGAIN = "download or save it again", "download it again"
ANEW = "download the model again"
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def weights(change: Callable[[Path], object]) -> Callable[[Place], object]:
    return lambda place: change(place.model / "model.safetensors")


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], object]:
    return weights(lambda path: edit_header(path, change))


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], object]:
    return weights(lambda path: edit_tensors(path, change))


def config(name: str = "model", **changes: object) -> Callable[[Place], object]:
    return lambda place: edit_json(
        getattr(place, name) / "config.json", lambda fields: fields.update(changes)
    )


def of_config(command: str, says: str, **changes: object) -> BadInput:
    """Return a row of a config with such fields."""
    return BadInput(command, says, AGAIN, config(**changes))


def index(text: str) -> Callable[[Place], object]:
    return lambda place: (place.sharded / INDEX).write_text(text)


def all_in(shard: object) -> Callable[[Place], object]:
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


def templates_elsewhere(*, is_link: bool) -> Callable[[Place], object]:
    """A template that would be copied into the output is a link to a secret, or in a linked folder.

    Args:
        is_link: the folder itself.
    """

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


def drop(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Place], object]:
    return tensors(lambda found: found.update({name: make(found[name])}))


def add(name: str, shape: tuple[int, ...]) -> Callable[[Place], object]:
    return tensors(lambda found: found.update({name: torch.zeros(shape)}))


FILES: Table = {
    "header longer than the file": BadInput(
        INSPECT,
        "{model}/model.safetensors is not a complete safetensors file",
        SAVE,
        weights(lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")),
    ),
    "empty weight file": BadInput(
        "verify {pruned}",
        "model.safetensors is not a complete safetensors file: it has 0 bytes",
        SAVE,
        lambda place: (place.pruned / "model.safetensors").write_bytes(b""),
    ),
    "interrupted download": BadInput(
        CALIBRATE.replace("model", "sharded"),
        "model-00002-of-00005.safetensors is truncated or damaged",
        SAVE,
        lambda place: cut(sorted(place.sharded.glob("model-*.safetensors"))[1], 5000),
    ),
    "a weight that is no number": BadInput(
        PRUNE_TEXT,
        "block 2 has NaN or infinite values",
        UP.format(2),
        replace(UP.format(2), lambda t: t * torch.nan),
    ),
    "activations beyond all numbers": BadInput(
        PRUNE_TEXT,
        "block 1 produced NaN or infinite activations",
        "",
        tensors(lambda found: found.update({n: found[n] * 1e30 for n in (GATE, UP.format(1))})),
    ),
    "overlapping offsets": BadInput(
        PRUNE_TEXT,
        f"{{model}}/model.safetensors is damaged: tensor {NORM}",
        SAVE,
        header(lambda h: h[NORM].update(data_offsets=[4, 132])),
    ),
    "dtype that nobody knows": BadInput(
        EXPORT,
        f"tensor {NORM} has dtype F1",
        "expected one of F64",
        header(lambda h: h[NORM].update(dtype="F1")),
    ),
    "another dtype than the bytes": BadInput(
        EVAL, f"tensor {NORM} [32] F16", SAVE, header(lambda h: h[NORM].update(dtype="F16"))
    ),
    "whole numbers as weights": BadInput(
        PRUNE_TEXT,
        f"{GATE} is stored as int8",
        "save the model in float32, bfloat16 or float16",
        replace(GATE, lambda t: t.to(torch.int8)),
    ),
    "quantised in a way that cannot be undone": BadInput(
        PRUNE_TEXT,
        "{model} is quantised (bitsandbytes), which cfsp cannot undo",
        "call dequantize() and save_pretrained(), and prune the result",
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "quantised by its config alone": BadInput(
        PRUNE_TEXT,
        "{model} is quantised (fp8) by its config.json, but none of its tensors is",
        "remove quantization_config there",
        config(quantization_config={"quant_method": "fp8"}),
    ),
    "header nested too deeply": BadInput(
        INSPECT,
        "{model}/model.safetensors is not a safetensors file",
        SAVE,
        weights(lambda path: path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)),
    ),
    "weights of a pickle": BadInput(
        "recover {model} --data {text} --steps 1 --out {out}",
        "a pickle, which can run code",
        "save the model as safetensors",
        weights(lambda path: path.rename(path.with_name("pytorch_model.bin"))),
    ),
    "no FFN matrix": BadInput(
        "recover {pruned} --data {text} --steps 1 --out {out}",
        f"lacks the tensor {GATE}",
        SAVE,
        lambda place: edit_tensors(place.pruned / "model.safetensors", drop(GATE)),
    ),
    "no norm, to calibrate": BadInput(
        CALIBRATE, f"{{model}} lacks the tensor {NORM}", SAVE, tensors(drop(NORM))
    ),
    "no norm, to evaluate": BadInput(
        EVAL, f"{{model}} lacks the tensor {NORM}", SAVE, tensors(drop(NORM))
    ),
    "no norm, to export": BadInput(
        EXPORT, f"{{model}} lacks the tensor {NORM}", SAVE, tensors(drop(NORM))
    ),
    "no embeddings": BadInput(
        "export {model} --to gguf --out {work}/out.gguf",
        "{model} lacks the tensor model.embed_tokens.weight",
        SAVE,
        tensors(drop("model.embed_tokens.weight")),
    ),
    "norm of another length": BadInput(
        EVAL,
        f"{NORM} of shape [16], its config asks for [32]",
        SAVE,
        replace(NORM, lambda t: t[:16].clone()),
    ),
    "attention of another width": BadInput(
        PRUNE_TEXT,
        "q_proj.weight of shape [32, 16], its config asks for [32, 32]",
        SAVE,
        replace("model.layers.0.self_attn.q_proj.weight", lambda t: t[:, :16].clone()),
    ),
    "a block more than the config says": BadInput(
        f"{PRUNE_TEXT} --repair none",
        "{model} has a tensor model.layers.3.mlp.up_proj.weight",
        SAVE,
        add("model.layers.3.mlp.up_proj.weight", (96, 32)),
    ),
    "an expert more than the config says": BadInput(
        CALIBRATE.replace("model", "mixtral"),
        "layers.0.mlp.experts.gate_up_proj of shape [4, 192, 32], its config asks for [2, 192, 32]",
        SAVE,
        config("mixtral", num_local_experts=2),
    ),
}

INDEXES: Table = {
    "index that climbs out": BadInput(
        SHARDED,
        f"{{sharded}}/{INDEX} names a file outside its directory: ../elsewhere.safetensors",
        ANEW,
        all_in("../elsewhere.safetensors"),
    ),
    "index with an absolute path": BadInput(
        CALIBRATE.replace("model", "sharded"),
        f"{INDEX} names a file outside its directory: /etc/passwd",
        ANEW,
        all_in("/etc/passwd"),
    ),
    "shard that is a link to elsewhere": BadInput(
        "verify {sharded}",
        "a link to a file outside the directory",
        "put the file itself there",
        shard_elsewhere,
    ),
    "link that would be copied into the output": BadInput(
        PRUNE_TEXT,
        "{model}/notes.txt is a link to a file outside the directory",
        "put the file itself there",
        tokenizer_elsewhere,
    ),
    "link in a folder that would be copied": BadInput(
        PRUNE_TEXT,
        "{model}/additional_chat_templates/more/tool.jinja is a link to a file outside the",
        "put the file itself there",
        templates_elsewhere(is_link=False),
    ),
    "folder that would be copied is a link": BadInput(
        EVAL,
        "{model}/additional_chat_templates is a link to a folder, ",
        "put the folder itself there",
        templates_elsewhere(is_link=True),
    ),
    "index with numbers for names": BadInput(
        "eval {sharded} --data {text} --windows 1 --seqlen 32",
        f"{{sharded}}/{INDEX} is not a checkpoint index",
        ANEW,
        all_in(7),
    ),
    "index with an endless name": BadInput(
        SHARDED, f"{{sharded}}/{INDEX} names xxxx", AGAIN, all_in("x" * 5000)
    ),
    "index nested too deeply": BadInput(
        SHARDED, f"{{sharded}}/{INDEX} is not a checkpoint index", ANEW, index("[" * 100_000)
    ),
    "index that is binary": BadInput(
        "export {sharded} --to vllm --out {out}",
        f"{{sharded}}/{INDEX} is not a checkpoint index",
        ANEW,
        lambda place: (place.sharded / INDEX).write_bytes(b"\xff\x00\xfe"),
    ),
    "index without one tensor": BadInput(
        SHARDED,
        f"holds {GATE}, which {INDEX} does not name",
        SAVE,
        lambda place: edit_json(place.sharded / INDEX, lambda f: f["weight_map"].pop(GATE)),
    ),
}

CONFIGS: Table = {
    "config that is no JSON": BadInput(
        INSPECT,
        "{model}/config.json is not a model config",
        AGAIN,
        lambda place: (place.model / "config.json").write_text("{"),
    ),
    "config that is a list": BadInput(
        "eval {model} --data {text}",
        "{model}/config.json is not a model config",
        AGAIN,
        lambda place: (place.model / "config.json").write_text("[]"),
    ),
    "config nested too deeply": BadInput(
        INSPECT,
        "{model}/config.json is not a model config",
        AGAIN,
        lambda place: (place.model / "config.json").write_text('{"a":' * 100_000),
    ),
    "config with a billion blocks": of_config(
        PRUNE_TEXT, "num_hidden_layers is 1000000000", num_hidden_layers=10**9
    ),
    "config with a number beyond all": of_config(INSPECT, "hidden_size is 1", hidden_size=10**30),
    "config with no blocks": of_config(PRUNE_TEXT, "num_hidden_layers is 0", num_hidden_layers=0),
    "config with negative width": of_config(
        INSPECT, "intermediate_size is -96", intermediate_size=-96
    ),
    "config with no heads": of_config(CALIBRATE, "num_attention_heads is 0", num_attention_heads=0),
    "config with heads that do not divide": of_config(
        CALIBRATE,
        "{model}/config.json",
        num_attention_heads=5,
        num_key_value_heads=3,
        head_dim=None,
    ),
    "config with a width of text": of_config(
        INSPECT, "intermediate_size is 'wide'", intermediate_size="wide"
    ),
    "config with a fraction of a block": of_config(
        PRUNE_TEXT, "num_hidden_layers is 2.5", num_hidden_layers=2.5
    ),
    "config with an unknown activation": of_config(
        PRUNE_TEXT,
        "no llama model can be built from the numbers and names in config.json (KeyError",
        hidden_act="magic",
    ),
    "config with a larger vocabulary": BadInput(
        PRUNE_TEXT,
        "model.embed_tokens.weight of shape [320, 32], its config asks for [640, 32]",
        SAVE,
        config(vocab_size=640),
    ),
    "widths for blocks that are not there": BadInput(
        CALIBRATE.replace("model", "pruned"),
        "{pruned}/config.json",
        AGAIN,
        lambda place: edit_json(
            place.pruned / "config.json",
            lambda f: f["per_layer_config"].update({"999999999": {"intermediate_size": 8}}),
        ),
    ),
    "widths of one block are no table": BadInput(
        "inspect {pruned}",
        "{pruned}/config.json is not a usable llama config: ffn_widths is ",
        AGAIN,
        lambda place: edit_json(
            place.pruned / "config.json", lambda f: f.update(ffn_widths={"0": 8})
        ),
    ),
    "width of an FFN that is not there": BadInput(
        "inspect {pruned}",
        "config.json gives a width for 'moe' of block 0, which the model does not have",
        ANEW,
        lambda place: edit_json(
            place.pruned / "config.json",
            lambda f: f.update(per_layer_config=None, ffn_widths={"0": {"moe": 8}}),
        ),
    ),
    "width of an FFN is text": BadInput(
        "inspect {pruned}",
        "config.json gives block 0 'x' FFN channels, expected 1 to ",
        ANEW,
        lambda place: edit_json(
            place.pruned / "config.json",
            lambda f: f.update(per_layer_config=None, ffn_widths={"0": {"mlp": "x"}}),
        ),
    ),
    "width of one block is text": BadInput(
        "inspect {pruned}",
        "{pruned}/config.json",
        AGAIN,
        lambda place: edit_json(
            place.pruned / "config.json",
            lambda f: f["per_layer_config"].update({"0": {"intermediate_size": "x"}}),
        ),
    ),
    "modelling code of somebody else": BadInput(
        "recover {model} --data {text} --steps 1 --out {out}",
        "{model} brings its own modelling code",
        "cfsp prunes stock models and its own output only",
        config(auto_map={"AutoModelForCausalLM": "evil.Model"}),
    ),
    "auto_map that is a list": BadInput(
        INSPECT,
        "{model} brings its own modelling code",
        "cfsp prunes stock models and its own output only",
        config(auto_map=["evil.Model"]),
    ),
    "more positions than were learnt": BadInput(
        "calibrate {gpt2} --out {out} --data {text} --samples 4 --seqlen 512",
        "{gpt2} has learnt 256 positions, the windows have 512 tokens",
        "give a --seqlen of at most 256",
    ),
    "more positions than were learnt, to evaluate": BadInput(
        "eval {gpt2} --data {text} --windows 1 --seqlen 512",
        "has learnt 256 positions, the windows have 512 tokens",
        "give a --seqlen of at most 256",
    ),
    "a square of positions": BadInput(
        CALIBRATE.replace("model", "gpt2"),
        "transformer.wpe.weight of shape [256, 32], its config asks for [1000000, 32]",
        SAVE,
        config("gpt2", n_positions=1_000_000),
    ),
    "an encoder": BadInput(
        "verify {model}",
        "model type 'bert' is an encoder (its config does not say is_decoder)",
        "cfsp prunes decoder-only language models",
        config(model_type="bert"),
    ),
}

CASES: Table = {**FILES, **INDEXES, **CONFIGS}


@pytest.mark.parametrize("name", CASES)
def test_refused(refused: Callable[[BadInput], None], name: str) -> None:
    refused(CASES[name])


@pytest.mark.parametrize("name", ["a--b", "a--secret"])
def test_links_into_the_cache_of_the_hub_are_followed(place: Place, name: str) -> None:
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
    assert json.loads((snapshot / INDEX).read_text())["weight_map"]
