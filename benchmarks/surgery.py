"""Throughput of surgery on a large checkpoint, as a ratio to `cp` of the same files.

    python benchmarks/surgery.py --gigabytes 4 --directory SCRATCH

Writes a random Llama checkpoint of the given size, then in turn copies it with `cp -r` and
prunes it with an existing plan (no forward pass). Throughput counts bytes read and written; the
page cache is warm for both, and both end with the data flushed to disk (`sync` after `cp`, fsync
in surgery, which also hashes what it writes). Everything is removed afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from cfsp.checkpoint.reading import Checkpoint
from cfsp.cut.surgery import write_pruned_weights
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan

HIDDEN, FFN = 2048, 8192


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        source = write_random_checkpoint(Path(scratch) / "source", args.gigabytes)
        plan = half_plan(source)
        read = sum(spec.nbytes for spec in source.specs.values())
        copied, pruned = [], []
        for _ in range(args.rounds):
            copied.append(2 * read / timed_copy(source.directory, Path(scratch) / "copy"))
            target = Path(scratch) / "pruned"
            target.mkdir()
            start = time.perf_counter()
            written = write_pruned_weights(source, plan, target).nbytes
            pruned.append((read + written) / (time.perf_counter() - start))
            shutil.rmtree(target)
    ratios = [p / c for p, c in zip(pruned, copied, strict=True)]
    print(
        f"{read / 1e9:.1f} GB checkpoint, half of the FFN channels removed, {args.rounds} rounds\n"
    )
    print("| | GB/s read and written (min, median, max) |\n|---|---|")
    for name, rates in (("cp and sync", copied), ("surgery", pruned)):
        spread = ", ".join(f"{r / 1e9:.2f}" for r in (min(rates), median(rates), max(rates)))
        print(f"| {name} | {spread} |")
    print(f"\nratio surgery / cp, median of rounds: {median(ratios):.2f}")


def write_random_checkpoint(directory: Path, gigabytes: float) -> Checkpoint:
    """Write a Llama of about this size in shards of one block each."""
    directory.mkdir()
    block_bytes = 2 * (3 * HIDDEN * FFN + 4 * HIDDEN * HIDDEN)
    blocks = max(1, round(gigabytes * 1e9 / block_bytes))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    weight_map = {}
    for block in range(blocks):
        tensors = {
            f"model.layers.{block}.{name}.weight": torch.randn(shape).bfloat16()
            for name, shape in shapes.items()
        }
        if block == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(1024, HIDDEN).bfloat16()
            tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        name = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    import json

    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint(directory)


def half_plan(source: Checkpoint) -> PruningPlan:
    """Keep every second channel of every block."""
    kept = tuple(range(0, FFN, 2))
    units = tuple(UnitPlan(unit.block, FFN, kept, 0.1, 0.5) for unit in source.units)
    return PruningPlan(ModelIdentity.of(source), {}, {}, units)


def timed_copy(source: Path, target: Path) -> float:
    """Copy with cp, flush to disk, and return the seconds."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
