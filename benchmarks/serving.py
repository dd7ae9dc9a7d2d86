"""Serve pruned checkpoints and their exports over HTTP; compare greedy tokens and speed.

    make serve-check

prunes the demo model in a hurry, and a small random model of each of some types, and serves each of
them in every runtime in the form that this one reads: the plain directory through vLLM's
Transformers backend, the DeciLM export through vLLM's own class and through mlx-lm, the GGUF file
through llama.cpp's server. All are asked through the OpenAI client for greedy continuations of a
few texts, whose tokens are compared with those of transformers. The dense demo is served beside the
pruned one and both answer in turns; speeds are in tokens per second of processor time, which other
programs on the machine disturb least. It prints a table and ends with status 1 if any token
differs. All is in float32, where a token has no excuse, and with one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
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
ROUNDS = 3
# The servers' own programs are beside this Python.
PROGRAMS = Path(sys.executable).parent
PATIENCE_SECONDS = 900
TYPES = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# llama.cpp runs these with one width for all blocks only.
_EQUAL = ("gemma2", "gemma3_text")

# The server of llama.cpp as the package xllamacpp has it: llama-server in this process. One
# thread: several wait for each other busily, which is endless where other programs run. Its flash
# attention rounds to 16 bits, which decides between two tokens that are nearly as likely.
_LLAMA_SERVER = """
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel = 256, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Asked:
    """A model that continues every text, and the processor time that it has taken so far."""

    continued: Callable[[], list[list[int]]]
    cpu_seconds: Callable[[], float]


@dataclass(frozen=True)
class Server:
    """A server that speaks the OpenAI protocol, and the form of a checkpoint that it is given."""

    name: str
    package: str  # that must be installed
    make: Callable[[Path, Path], Path]  # writes that form into a folder; raises ExportError
    command: Callable[[Path, int], list[str]]  # from the path and the port
    tokens: Callable[[dict[str, Any]], list[int]]  # of an answer's choice
    question: dict[str, Any]  # fields of a request that ask for tokens beside the text
    for_pruned: tuple[str, ...] = ()  # options of the command for the pruned model only
    skips_halves: bool = False  # the answer leaves out tokens that are half a character


class ServerError(Exception):
    """A server did not start, or did not answer."""


def main() -> int:
    """Prune, export, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        default=(DEMO_NAME, *TYPES),
        help=f"{DEMO_NAME}, or a model type of which a random one is made "
        f"(default: {DEMO_NAME} {' '.join(TYPES)})",
    )
    names = tuple(server.name for server in SERVERS)
    parser.add_argument("--server", choices=names, action="append", help="(default: all)")
    args = parser.parse_args()
    servers = [server for server in SERVERS if server.name in (args.server or names)]
    if missing := {s.package for s in servers if importlib.util.find_spec(s.package) is None}:
        parser.error(
            f"{', '.join(sorted(missing))} not installed here; `make serve-check` installs all "
            "servers in .serve, or name others with --server"
        )
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            work = Path(folder) / name
            work.mkdir()
            pruned, dense = _pruned(name, work)
            # How fast tiny models are says nothing about any other.
            for row in _rows(servers, pruned, dense if name == DEMO_NAME else None, work):
                rows.append((name, *row))
                print(" | ".join(rows[-1]), flush=True)
    print(
        "\n| model | runtime | same tokens | tokens/s | over dense |\n|---|---|---|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
        sep="\n",
    )
    return 1 if any(row[2].startswith("NO") for row in rows) else 0


def _pruned(name: str, work: Path) -> tuple[Path, Path]:
    """Prune the demo, or a random model of a type, in multiples of 256; return it and the dense."""
    dense, demo = work / "dense", locate_model(DEMO_NAME)
    if name == DEMO_NAME:
        model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    else:
        model = _random_model(name)
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(demo).save_pretrained(dense)
    # In multiples of 256 the DeciLM export is the one that mlx-lm reads, too.
    cfsp.prune(
        dense,
        out=work / "plain",
        sparsity=0.3,
        samples=2,
        seqlen=128,
        effort="fast",
        multiple=256,
        widths="equal" if name in _EQUAL else "importance",
    )
    return work / "plain", dense


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


def _rows(
    servers: Sequence[Server], pruned: Path, dense: Path | None, work: Path
) -> Iterator[tuple[str, str, str, str]]:
    """Yield runtime, what is the same, tokens a second, and those over the dense model's."""
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    stock = _transformers(pruned)
    continued = stock.continued()
    yield "transformers", "", *_speeds(stock, _transformers(dense) if dense else None)
    for server in servers:
        try:
            with ExitStack() as stack:
                ours = _served(server, pruned, work / "of-pruned", server.for_pruned)
                asked = stack.enter_context(ours)
                theirs = None
                if dense:
                    theirs = stack.enter_context(_served(server, dense, work / "of-dense", ()))
                expected, found = continued, asked.continued()
                if server.skips_halves:
                    expected, found = (_whole(tokenizer, tokens) for tokens in (expected, found))
                equal = sum(map(list.__eq__, expected, found))
                said = "yes" if equal == len(continued) else "NO"
                yield server.name, f"{said}: {equal} of {len(continued)}", *_speeds(asked, theirs)
        except ExportError as error:
            yield server.name, f"refused: {error}", "", ""
        except ServerError as error:
            yield server.name, f"NO: {error}", "", ""


def _whole(tokenizer: Any, continued: list[list[int]]) -> list[list[int]]:
    """Return the tokens without those that are half a character."""
    return [[t for t in tokens if "\ufffd" not in tokenizer.decode([t])] for tokens in continued]


def _speeds(pruned: Asked, dense: Asked | None) -> tuple[str, str]:
    """Return tokens a second, and their ratio to the dense model's, medians of rounds in turns."""
    both = [asked for asked in (pruned, dense) if asked]
    for asked in both:
        # The first answer takes longer than all others.
        asked.continued()
    rounds = [[_seconds(asked) for asked in both] for _ in range(ROUNDS)]
    rate = median(NEW_TOKENS * len(TEXTS) / seconds[0] for seconds in rounds)
    ratios = sorted(seconds[-1] / seconds[0] for seconds in rounds)
    ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if dense else ""
    return f"{rate:.1f}", ratio


def _seconds(asked: Asked) -> float:
    start = asked.cpu_seconds()
    asked.continued()
    return asked.cpu_seconds() - start


def _transformers(directory: Path) -> Asked:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    )

    def continued() -> list[list[int]]:
        found = []
        for text in TEXTS:
            prompt = tokenizer(text, return_tensors="pt")
            tokens_BT = model.generate(
                **prompt, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
            )
            found.append(tokens_BT[0, prompt.input_ids.shape[1] :].tolist())
        return found

    return Asked(continued, time.process_time)


@contextmanager
def _served(
    server: Server, directory: Path, work: Path, options: tuple[str, ...]
) -> Iterator[Asked]:
    """Start a server of a checkpoint; yield how to ask it."""
    import openai

    path = server.make(directory, work)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*server.command(path, port), *options], stdout=log, stderr=log, env=_environment()
        ) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)

        def continued() -> list[list[int]]:
            try:
                return [_continued(server, client, path, text) for text in TEXTS]
            except openai.OpenAIError as error:
                raise ServerError(f"{type(error).__name__}: {error}") from error

        try:
            if not _answers(process, f"{address}/health"):
                log.seek(0)
                text = log.read()
                print(text[-5000:], file=sys.stderr)
                raise ServerError(next((t for t in text.splitlines()[::-1] if "Error" in t), "?"))
            yield Asked(continued, partial(_cpu_seconds, process.pid))
        finally:
            process.terminate()


def _continued(server: Server, client: Any, path: Path, text: str) -> list[int]:
    answer = client.completions.create(
        model=str(path),
        prompt=text,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, **server.question},
    )
    return server.tokens(answer.to_dict()["choices"][0])


def _cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and what it started."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _environment() -> dict[str, str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{PROGRAMS}:{environment['PATH']}"
    return environment


def _answers(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until a server answers; return whether it ever does."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except OSError:
            time.sleep(1)
    return False


def _exported(target: str, **options: Any) -> Callable[[Path, Path], Path]:
    def make(directory: Path, work: Path) -> Path:
        work.mkdir(exist_ok=True)
        out = work / ("model.gguf" if target == "gguf" else target)
        if not out.exists():
            cfsp.export(directory, target, out, verify=False, **options)
        return out

    return make


def _vllm(path: Path, port: int) -> list[str]:
    return [
        *(str(PROGRAMS / "vllm"), "serve", str(path), "--trust-remote-code"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "2", "--no-enable-prefix-caching"),
    ]


def _mlx_lm(path: Path, port: int) -> list[str]:
    program = str(PROGRAMS / "mlx_lm.server")
    return [program, "--model", str(path), "--host", "127.0.0.1", "--port", str(port)]


def _llama_cpp(path: Path, port: int) -> list[str]:
    return [sys.executable, "-c", _LLAMA_SERVER, str(path), str(port)]


_VLLM: dict[str, Any] = {
    "package": "vllm",
    "command": _vllm,
    "tokens": lambda choice: list(choice["token_ids"]),
    "question": {"return_token_ids": True},
}


def _logged_tokens(choice: dict[str, Any]) -> list[int]:
    return [token["id"] for token in choice["logprobs"]["content"]]


SERVERS = (
    Server(
        "vLLM, plain directory",
        make=lambda directory, work: directory,
        for_pruned=("--model-impl", "transformers"),
        **_VLLM,
    ),
    Server("vLLM, DeciLM export", make=_exported("vllm"), **_VLLM),
    Server(
        "llama.cpp server",
        "xllamacpp",
        _exported("gguf", weight_type="f32"),
        _llama_cpp,
        _logged_tokens,
        {"logprobs": 1},
        skips_halves=True,
    ),
    Server(
        "mlx-lm server",
        "mlx_lm",
        _exported("mlx-lm"),
        _mlx_lm,
        _logged_tokens,
        {"logprobs": True},
    ),
)


if __name__ == "__main__":
    sys.exit(main())
