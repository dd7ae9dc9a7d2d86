"""`kill -9` at random moments of prune, recover, sweep and eval; then the same command again.

    python benchmarks/kills.py --kills 25 --seed 0

Makes a tiny random model and runs every command undisturbed. Then, for every kill: a fresh place,
the command, a SIGKILL at a moment drawn evenly over the time of the undisturbed run, the same
command once more. What is there in the end must be the files of the undisturbed run, byte for
byte, and nothing else, neither beside the output nor among the system's temporary files; what was
read must be as it was. Passes save after every block, however fast, so that there is much to
disturb. Of JSON files, what depends on the clock is left out of the comparison (`CLOCK_KEYS`).

Commands are forked from a process that has imported everything, so a moment falls into their work
and not into the import of torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

# In the manifests: dates, times and memory.
CLOCK_KEYS = {"created", "seconds", "passes", "peak_rss_bytes", "tokens_per_second"}
COMMANDS = ("prune", "recover", "sweep", "eval")

Contents = dict[str, str]


class Ended(NamedTuple):
    """How a command ended: exit status or minus the signal, seconds, standard error."""

    status: int
    seconds: float
    stderr: str


@dataclass(frozen=True)
class Inputs:
    """What the commands read, and the place that they write in."""

    model: Path
    text: Path
    place: Path
    scratch: Path

    @property
    def out(self) -> Path:
        """The output of every command."""
        return self.place / "out"


def main() -> int:
    """Kill, compare, print a table; the exit status is 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="of each command (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=COMMANDS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "TOKENIZERS_PARALLELISM": "false",
        }
        import_everything()
        inputs = make_inputs(Path(scratch))
        print("| command | kills | moments | differed |\n|---|---:|---|---:|")
        differed = 0
        for name in args.command:
            moments, failures = kill_often(name, inputs, args.kills, args.seed)
            hit = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
            print(f"| `{name}` | {args.kills} | {hit} | {len(failures)} |", flush=True)
            for failure in failures:
                print(failure, file=sys.stderr)
            differed += len(failures)
    return 1 if differed else 0


def command_line(name: str, inputs: Inputs) -> list[str]:
    """Return what follows `cfsp`."""
    data, out = ["--data", str(inputs.text)], ["--out", str(inputs.out)]
    drawn = [*data, "--samples", "8", "--seqlen", "32"]
    lines = {
        "prune": ["prune", str(inputs.model), *drawn, "--sparsity", "0.5", "--multiple", "4",
                  "--eval", str(inputs.text), "--windows", "2", *out],
        "recover": ["recover", str(inputs.scratch / "pruned"), *data, "--seqlen", "32",
                    "--steps", "6", "--evaluations", "3", *out],
        "sweep": ["sweep", str(inputs.model), *drawn, "--sparsity", "0.25", "0.5", "--method",
                  "cfsp", "cfsp-plain", "--multiple", "4", "--eval", str(inputs.text),
                  "--windows", "2", *out],
        "eval": ["eval", str(inputs.scratch / "pruned"), "--against", str(inputs.model), *data,
                 "--windows", "2", "--seqlen", "32", *out],
    }  # fmt: skip
    return lines[name]


# One command.


def kill_often(name: str, inputs: Inputs, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Return which moments were hit, and a sentence for everything that was wrong."""
    argv, generator = command_line(name, inputs), random.Random(f"{name} {seed}")
    read = contents(inputs.scratch, inputs.place)
    for _ in range(2):  # the second one finds warm caches
        clear(inputs)
        whole = run(argv, inputs)
        if whole.status:
            raise SystemExit(f"undisturbed {name} ended with {whole.status}:\n{whole.stderr}")
    expected = contents(inputs.place)
    moments: Counter[str] = Counter()
    failures = []
    while moments.total() < kills:
        clear(inputs)
        moment = generator.uniform(0, whole.seconds)
        killed = run(argv, inputs, kill_after=moment)
        if killed.status != -signal.SIGKILL:
            continue  # it ended before
        moments[what_is_there(inputs)] += 1
        again = run(argv, inputs)
        wrong = differences(again, inputs, expected)
        failures += [f"{name} killed after {moment:.3f} s: {sentence}" for sentence in wrong]
    if contents(inputs.scratch, inputs.place) != read:
        failures.append(f"{name} changed what it read")
    return moments, failures


def differences(again: Ended, inputs: Inputs, expected: Contents) -> list[str]:
    """Return what is wrong after the second run."""
    # A run that was killed after its last step is complete, and refused as any other output.
    complete = again.status == 2 and "exists and is not empty" in again.stderr
    if again.status and not complete:
        return [f"the same command ended with {again.status}: {again.stderr[-2000:]}"]
    found = contents(inputs.place)
    return [
        f"{path} is {'missing' if path not in found else 'left' if path not in expected else 'new'}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def what_is_there(inputs: Inputs) -> str:
    """Return a name for the moment of a kill, by what it left."""
    paths = [path.relative_to(inputs.place) for path in inputs.place.rglob("*") if path.is_file()]
    names = [str(path) for path in paths]
    if (inputs.out / "cfsp.json").is_file() or (inputs.out / "table.json").is_file():
        return "when the output was there"
    if any(re.search(r"(\.partial-[\w-]+|\.working)/model.*safetensors$", name) for name in names):
        return "with weights written"
    if any(re.search(r"/(state|trainer_state|dense)\.json$", name) for name in names):
        return "after a save"
    return "before the first save"


def clear(inputs: Inputs) -> None:
    """Make the place of the output, and temporary files in it, empty."""
    shutil.rmtree(inputs.place, ignore_errors=True)
    (inputs.place / "tmp").mkdir(parents=True)


def run(argv: Sequence[str], inputs: Inputs, kill_after: float | None = None) -> Ended:
    """Run one command in a process of its own."""

    def command() -> int:
        os.environ["TMPDIR"], tempfile.tempdir = str(inputs.place / "tmp"), None
        from cfsp.cli import main as cfsp_main
        from cfsp.streaming import block_pass

        block_pass.SHARE_OF_TIME = float("inf")
        return cfsp_main(argv)

    log = inputs.scratch / "log"
    start = time.monotonic()
    child = forked(command, log)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - start
    stderr = log.read_text()
    log.unlink()
    return Ended(status, seconds, stderr)


def forked(work: Callable[[], int], log: Path) -> int:
    """Work in a fork, whose output goes to a file; return its process id.

    This process itself never computes: threads do not survive forks.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# Files.


def contents(directory: Path, but: Path | None = None) -> Contents:
    """Return the digest of every file, directories as well, of which the clock is no part."""
    return {
        str(path.relative_to(directory)): digest(path) if path.is_file() else "directory"
        for path in sorted(directory.rglob("*"))
        if path.name != "modules" and "modules" not in path.relative_to(directory).parts
        if but is None or not path.is_relative_to(but)
    }


def digest(path: Path) -> str:
    """Return the digest of one file without what the clock decides."""
    data = path.read_bytes()
    if path.name == "cfsp.json":
        data = json.dumps(without_clock(json.loads(data))).encode()
    if path.name == "README.md":
        data = re.sub(rb"\n- (time|memory|made): [^\n]*|[\d,]+ tokens/s", b"", data)
    return sha256(data).hexdigest()


def without_clock(value: Any) -> Any:
    """Return JSON without the keys in `CLOCK_KEYS`, at any depth."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK_KEYS}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


# What there is before.


def import_everything() -> None:
    """Import what the commands import; a fork has it then."""
    import accelerate
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama

    import cfsp.cli
    import cfsp.recovery.recover
    import cfsp.recovery.trainer
    import cfsp.sweep.run  # noqa: F401

    assert accelerate and transformers.Trainer
    torch.set_num_threads(1)
    # In a fork the collector would walk through all of that.
    gc.freeze()


def make_inputs(scratch: Path) -> Inputs:
    """Make a tiny model, a text, and a pruned model to recover, in a process of their own."""
    inputs = Inputs(scratch / "model", scratch / "text.txt", scratch / "place", scratch)
    inputs.text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:12])[:40_000])
    log = scratch / "log"
    if os.waitpid(forked(lambda: make_model(inputs.model), log), 0)[1]:
        raise SystemExit(f"cannot make the model:\n{log.read_text()}")
    log.unlink()
    clear(inputs)
    ended = run([*command_line("prune", inputs), "--repair", "none"], inputs)
    if ended.status:
        raise SystemExit(f"cannot prune:\n{ended.stderr}")
    inputs.out.rename(scratch / "pruned")
    return inputs


def make_model(directory: Path) -> int:
    """Write a random Llama of three tiny blocks with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from make_checkpoint import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
