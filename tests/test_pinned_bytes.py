"""What pruning writes, byte for byte, on tiny models of five families.

A change that only moves or renames code must leave these digests as they are. Channels, files of
configuration and code are pinned everywhere; numbers that arithmetic gives (repaired and trained
weights) only on a machine that computes as the one that pinned them did.

To pin anew after a change that is meant to change results:

    CFSP_PIN=1 python -m pytest tests/test_pinned_bytes.py
"""

import json
import os
import platform
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import cfsp
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.exports.registry import export
from cfsp.pipeline import prune_checkpoint
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.settings import Adaptation, Limit, RecoverSettings, Training
from cfsp.settings import Budget, CalibrationText, Compute, Criterion, PruneSettings

PINNED = Path(__file__).parent / "pinned_bytes.json"

# A family that stores its FFN in a way of its own, and a repair.
CASES = {
    "llama": "ridge",
    "gpt2": "sequential",
    "phi3": "none",
    "mixtral": "ridge",
    "gemma3_text": "sequential",
}


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def processor() -> str:
    """Return what libraries choose their code by; the set of instructions alone does not say it."""
    told = Path("/proc/cpuinfo")
    if not told.is_file():
        return platform.processor()
    first, _, _ = told.read_text().partition("\n\n")
    chosen_by = ("vendor_id", "cpu family", "model\t", "stepping", "cache size", "flags")
    return digest("".join(re.findall(rf"^(?:{'|'.join(chosen_by)}).*", first, re.M)).encode())


def arithmetic() -> dict[str, str]:
    return {
        "processor": processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,  # builds may multiply by other libraries
        "transformers": transformers.__version__,
    }


def weights_digest(directory: Path) -> str:
    whole = sha256()
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name).contiguous()
                whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                whole.update(tensor.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def settings_digests(directory: Path) -> dict[str, str]:
    config = json.loads((directory / "config.json").read_text())
    config.pop("transformers_version", None)
    code = sorted(directory.glob("*.py"))
    return {
        "config": digest(json.dumps(config, sort_keys=True).encode()),
        "code": digest(b"".join(file.read_bytes() for file in code)),
    }


def channels_digest(plan: cfsp.PruningPlan) -> str:
    return digest(json.dumps([list(unit.kept) for unit in plan.units]).encode())


DRAWN: dict[str, Any] = {"samples": 8, "seqlen": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def half(model, text_file, tmp_path_factory) -> Path:
    """A tiny Llama with half of its channels, without repair."""
    out = tmp_path_factory.mktemp("half") / "pruned"
    asked = {"sparsity": 0.5, "multiple": 8, "data": [str(text_file)], **DRAWN}
    cfsp.prune(model, out=out, repair="none", **asked)
    return out


def compare(name: str, everywhere: dict[str, str], here: dict[str, str]) -> None:
    pinned: dict[str, Any] = json.loads(PINNED.read_text()) if PINNED.is_file() else {}
    if os.environ.get("CFSP_PIN"):
        pinned["arithmetic"] = arithmetic()
        pinned[name] = {"everywhere": everywhere, "arithmetic": here}
        PINNED.write_text(json.dumps(pinned, indent=1, sort_keys=True) + "\n")
    assert everywhere == pinned[name]["everywhere"]
    if pinned["arithmetic"] == arithmetic():
        assert here == pinned[name]["arithmetic"]


@pytest.mark.parametrize("name", CASES)
def test_prune(tmp_path, tiny_checkpoint, text_file, name):
    out = tmp_path / "pruned"
    repair: Any = CASES[name]
    settings = PruneSettings(
        Budget(0.4, multiple=8),
        Criterion("angular"),  # by sensitivity, widths depend on the machine's arithmetic
        CalibrationText((str(text_file),), samples=16, seqlen=32),
        Compute("cpu"),
        repair,
    )
    prune_checkpoint(open_checkpoint(tiny_checkpoint(name)), out, settings)
    plan = cfsp.PruningPlan.load(out / PLAN_FILE)
    compare(
        f"prune {name} {repair}",
        {"channels": channels_digest(plan), **settings_digests(out)},
        {"weights": weights_digest(out)},
    )


def test_calibrate_plan_and_export(tmp_path, model, text_file, half):
    statistics = cfsp.calibrate(model, data=[str(text_file)], block_metric="angular", **DRAWN)
    plan = cfsp.plan(model, statistics, sparsity=0.5, multiple=8)
    found = {"plan": channels_digest(plan), "weights": weights_digest(half)}
    export(half, "vllm", tmp_path / "vllm")
    found["vllm"] = weights_digest(tmp_path / "vllm")
    found["vllm config"] = settings_digests(tmp_path / "vllm")["config"]
    compare("plan and export", found, {})


def test_recover(tmp_path, text_file, half):
    out = tmp_path / "recovered"
    how = Training(Limit(steps=4), learning_rate=1e-3, batch_windows=2, seqlen=32, evaluations=2)
    adaptation = Adaptation(rank=2, allocation="importance")
    settings = RecoverSettings((str(text_file),), how, adaptation)
    recover_checkpoint(open_checkpoint(half), out, settings)
    compare("recover", settings_digests(out), {"weights": weights_digest(out)})
