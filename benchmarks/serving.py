"""Serve pruned checkpoints and their exports over HTTP and compare greedy tokens.

    make serve-check

prunes the demo model in a hurry, and a small random model of each --family, and serves each of
them three ways: the plain directory through vLLM's Transformers backend, the DeciLM export through
vLLM's own class, and the GGUF file through llama.cpp's server. All are asked through the OpenAI
protocol for greedy continuations of a few texts, whose tokens are compared with those of
transformers. It prints a table and ends with status 1 if any token differs. All is in float32,
where a token has no excuse.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cfsp
from cfsp.checkpoint.locating import DEMO_NAME, locate_model
from cfsp.errors import ExportError

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils when",
)
NEW_TOKENS = 24
PATIENCE_SECONDS = 3600
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# llama.cpp runs these with one width for all blocks only.
_EQUAL = ("gemma2", "gemma3_text")

# The server of llama.cpp as the package xllamacpp has it: llama-server in this process. One
# thread: several wait for each other busily, which is endless where other programs run.
_LLAMA_SERVER = """
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel = 256, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Runtime:
    """A server and the form of a checkpoint that it is given.

    Attributes:
        name: in the table.
        make: writes that form of a checkpoint into a folder and returns its path; raises
            ExportError.
        command: of the server, from its Python, the path and the port.
        question: fields of a request that ask for tokens beside the text.
        tokens: of an answer.
    """

    name: str
    make: Callable[[Path, Path], Path]
    command: Callable[[str, Path, int], list[str]]
    question: dict[str, Any]
    tokens: Callable[[dict[str, Any]], list[int]]


def main() -> int:
    """Prune, export, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="the Python of an environment with vLLM and xllamacpp")
    parser.add_argument("--model", help="a pruned checkpoint (default: the demo, pruned here)")
    parser.add_argument(
        "--family",
        action="append",
        help=f"a model type of which a random model is served, too; repeat it "
        f"(default: {', '.join(FAMILIES)})",
    )
    parser.add_argument("--runtime", choices=tuple(r.name for r in RUNTIMES), action="append")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = [args.model or DEMO_NAME, *(args.family or FAMILIES)]
        for number, name in enumerate(names):
            work = Path(folder) / str(number)
            plain = Path(args.model) if number == 0 and args.model else _pruned(name, work)
            prompts = _prompts(plain)
            expected = _greedy(plain, prompts)
            for runtime in RUNTIMES:
                if args.runtime and runtime.name not in args.runtime:
                    continue
                rows.append(
                    (name, runtime.name, *_cell(args.python, runtime, plain, work, expected))
                )
                print(" | ".join(rows[-1]), flush=True)
    print("\n| model | runtime | same tokens | tokens/s |\n|---|---|---|---:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 1 if any(row[2].startswith("NO") for row in rows) else 0


def _pruned(name: str, work: Path) -> Path:
    """Prune the demo, or a random model of a type, in multiples of 256; return the directory."""
    model: str | Path = name
    if name != DEMO_NAME:
        model = work / "dense"
        _random_model(name).save_pretrained(model)
        AutoTokenizer.from_pretrained(locate_model(DEMO_NAME)).save_pretrained(model)
    # In multiples of 256 the DeciLM export is the one that SGLang and mlx-lm read, too.
    cfsp.prune(
        str(model),
        out=work / "plain",
        sparsity=0.3,
        samples=2,
        seqlen=128,
        effort="fast",
        multiple=256,
        widths="equal" if name in _EQUAL else "importance",
    )
    return work / "plain"


def _random_model(model_type: str) -> Any:
    """Return a random model with the demo's vocabulary and heads that all kernels know."""
    vocabulary = AutoTokenizer.from_pretrained(locate_model(DEMO_NAME)).vocab_size
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        sliding_window=256 if model_type in _EQUAL else None,
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
        # Larger than the usual 0.02, so that choices between tokens are clear.
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _cell(
    python: str, runtime: Runtime, plain: Path, work: Path, expected: list[list[int]]
) -> tuple[str, str]:
    """Serve one checkpoint in one runtime; return what of it is the same, and tokens a second."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        path = runtime.make(plain, work)
    except ExportError as error:
        return f"refused: {error}", ""
    try:
        found, speed = _served(python, runtime, path, _prompts(plain))
    except ServerError as error:
        return f"NO: {error}", ""
    equal = sum(a == b for a, b in zip(expected, found, strict=True))
    said = "yes" if equal == len(expected) else "NO"
    return f"{said}: {equal} of {len(expected)}", f"{speed:.1f}"


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


class ServerError(Exception):
    """A server did not start."""


def _served(
    python: str, runtime: Runtime, path: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], float]:
    """Return what a server continues the prompts with, and its tokens a second."""
    continued = []
    with _server(python, runtime, path) as address:
        # The first answer of a server takes longer than all others.
        for prompt in (prompts[0], *prompts):
            if not continued:
                start = time.perf_counter()
            question = {
                "model": str(path),
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                **runtime.question,
            }
            answer = requests.post(f"{address}/v1/completions", json=question, timeout=300)
            answer.raise_for_status()
            continued.append(runtime.tokens(answer.json()["choices"][0]))
        seconds = time.perf_counter() - start
    return continued[1:], NEW_TOKENS * len(prompts) / seconds


@contextmanager
def _server(python: str, runtime: Runtime, path: Path) -> Iterator[str]:
    """Serve a model; yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = runtime.command(python, path, port)
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
                text = log.read()
                print(text[-5000:], file=sys.stderr)
                raise ServerError(next((t for t in text.splitlines()[::-1] if "Error" in t), "?"))
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
        except requests.RequestException:
            pass
        time.sleep(1)
    return False


def _exported(target: str, name: str, **options: Any) -> Callable[[Path, Path], Path]:
    def make(plain: Path, work: Path) -> Path:
        cfsp.export(plain, target, work / name, **options)
        return work / name

    return make


def _vllm(*options: str) -> Callable[[str, Path, int], list[str]]:
    def command(python: str, path: Path, port: int) -> list[str]:
        return [
            # What `vllm serve` starts; that command does not run in the package vllm-cpu 0.32.
            *(python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(path), "--trust-remote-code", *options),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "256", "--max-num-seqs", "2"),
        ]

    return command


def _tokens_of_vllm(choice: dict[str, Any]) -> list[int]:
    return list(choice["token_ids"])


def _tokens_of_llama_cpp(choice: dict[str, Any]) -> list[int]:
    return [token["id"] for token in choice["logprobs"]["content"]]


RUNTIMES = (
    Runtime(
        "vLLM, plain directory",
        lambda plain, work: plain,
        _vllm("--model-impl", "transformers"),
        {"return_token_ids": True},
        _tokens_of_vllm,
    ),
    Runtime(
        "vLLM, DeciLM export",
        _exported("vllm", "decilm"),
        _vllm(),
        {"return_token_ids": True},
        _tokens_of_vllm,
    ),
    Runtime(
        "llama.cpp server",
        _exported("gguf", "model.gguf", weight_type="f32"),
        lambda python, path, port: [python, "-c", _LLAMA_SERVER, str(path), str(port)],
        {"logprobs": 1},
        _tokens_of_llama_cpp,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
