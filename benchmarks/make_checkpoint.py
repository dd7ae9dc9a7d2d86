"""A sharded checkpoint of a well-known model's true shape, with random weights.

    python benchmarks/make_checkpoint.py --shape llama-3-8b --out SCRATCH/llama-3-8b

Needs memory for a few megabytes of one tensor, whatever the model's size: 16 GB on disk for
Llama 3 8B. Weights are normal with a deviation of 0.02 (norms are one), bfloat16. The tokenizer
has the 256 bytes and nothing else, so that any text becomes tokens of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from cfsp.architecture.model_classes import model_class_of
from cfsp.checkpoint.output import staged_directory
from cfsp.checkpoint.skeleton import build_skeleton
from cfsp.checkpoint.tensor_file import StoredTensor, TensorSpec, tensor_chunks, write_shards

_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rope_theta",
)  # fmt: skip
# The published numbers that say how large the matrices of well-known models are.
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_KEYS, numbers, strict=True))
    for name, numbers in {
        "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True, 10000.0),
        "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, True, 500000.0),
        "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, False, 10000.0),
        "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False, 500000.0),
        "llama-3-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False, 500000.0),
    }.items()
}

DEVIATION = 0.02
_CHUNK = 4 << 20


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, choices=tuple(SHAPES))
    parser.add_argument("--blocks", type=int, help="how many blocks (default: all)")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    nbytes = make_checkpoint(args.out, args.shape, args.blocks)
    print(f"{nbytes / 1e9:.2f} GB written to {args.out}")


def make_checkpoint(
    out: Path,
    shape: str,
    blocks: int | None = None,
    shard_gigabytes: float = 2.0,
    device: torch.device | None = None,
) -> int:
    """Write a checkpoint and return the size of its tensors in bytes.

    Random numbers are made on the device, and others there.
    """
    device = device or torch.device("cpu")
    config = config_of(shape, blocks)
    skeleton = build_skeleton(config, torch.bfloat16)
    tied = set(skeleton.all_tied_weights_keys)
    tensors = {
        name: _RandomTensor(name, TensorSpec.of(parameter), device)
        for name, parameter in skeleton.named_parameters()
        if name not in tied
    }
    with staged_directory(out) as staging:
        fields = config.to_dict() | {
            "architectures": [model_class_of(config).__name__],
            "dtype": "bfloat16",
        }
        (staging / "config.json").write_text(json.dumps(fields, indent=2, default=str) + "\n")
        byte_tokenizer().save_pretrained(staging)
        write_shards(staging, tensors, int(shard_gigabytes * 1e9))
    return sum(tensor.spec.nbytes for tensor in tensors.values())


def config_of(shape: str, blocks: int | None = None) -> PreTrainedConfig:
    """Return the config of a shape with so many blocks; None for all."""
    fields = dict(SHAPES[shape])
    fields["num_hidden_layers"] = blocks or fields["num_hidden_layers"]
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


@dataclass(frozen=True)
class _RandomTensor(StoredTensor):
    name: str
    spec: TensorSpec
    device: torch.device

    def chunks(self) -> Iterator[memoryview]:
        # A seed for every tensor: shards then do not depend on each other.
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        left = self.spec.elements
        while left:
            count = min(left, _CHUNK)
            if len(self.spec.shape) == 1:
                values = torch.ones(count)
            else:
                values = torch.randn(count, generator=generator, device=self.device).mul_(DEVIATION)
            yield from tensor_chunks(values.bfloat16().cpu())
            left -= count


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, and two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
