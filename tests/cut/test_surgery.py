"""Surgery: shards in and out, byte-for-byte copies, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cfsp
from cfsp.checkpoint import output
from cfsp.checkpoint.output import staged_directory, write_atomically
from cfsp.checkpoint.reading import Checkpoint, channel_parameters
from cfsp.checkpoint.shards import write_shards
from cfsp.checkpoint.tensor_file import TensorFile
from cfsp.cut.surgery import PrunedSource
from cfsp.errors import CfspError, CheckpointError, OutputError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from tiny_models import save_tiny_model

SETTINGS: dict[str, Any] = {"sparsity": 0.4, "samples": 4, "seqlen": 32}
KEPT = ((0, 5, 7, 95), tuple(range(96)), tuple(range(1, 96, 2)))


def plan_for(source: Any) -> PruningPlan:
    """The first block keeps four channels, the second all, the third every other."""
    return PruningPlan(
        ModelIdentity.of(source),
        {},
        {"windows": 1, "seqlen": 2},
        tuple(UnitPlan(i, 96, kept, 0.1, 0.5) for i, kept in enumerate(KEPT)),
    )


def stored_bytes(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and raw bytes of every tensor, whatever shard it is in."""
    result = {}
    for path in directory.glob("*.safetensors"):
        file = TensorFile(path)
        for name, spec in file.specs.items():
            assert name not in result
            result[name] = (
                spec.dtype,
                spec.shape,
                b"".join(map(bytes, file.tensors[name].chunks())),
            )
    return result


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("dtype", "sharded_source", "sharded_output"),
    [
        (torch.float32, False, False),
        (torch.float16, False, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, True),
    ],
)
def test_shards_in_and_out(
    tmp_path: Path, dtype: torch.dtype, sharded_source: bool, sharded_output: bool
) -> None:
    source_directory, out = tmp_path / "source", tmp_path / "out"
    save_tiny_model(
        "llama-biased",
        source_directory,
        dtype=dtype,
        max_shard_size="20KB" if sharded_source else "1GB",
    )
    source = Checkpoint(source_directory)
    plan = plan_for(source)
    out.mkdir()
    limit = 20_000 if sharded_output else 10**9
    written = write_shards(out, list(PrunedSource(source, plan).outgoing()), limit)

    before, after = stored_bytes(source_directory), stored_bytes(out)
    assert before.keys() == after.keys()
    channels = channel_parameters(source.architecture)
    for name, (stored_dtype, shape, raw) in after.items():
        assert stored_dtype == before[name][0]
        index, path = channels.get(name, (0, ""))
        if not path or KEPT[index] == tuple(range(96)):
            assert (shape, raw) == before[name][1:], name
        else:
            axis = source.units[index].axes[path].axis
            expected = source.read(name).index_select(axis, torch.tensor(KEPT[index]))
            assert shape == tuple(expected.shape)
            assert raw == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert {n: s.shape for n, s in PrunedSource(source, plan).specs.items()} == {
        n: shape for n, (_, shape, _) in after.items()
    }
    assert set(written) == {p.name for p in out.glob("*.safetensors")}

    files = sorted(out.glob("*.safetensors"))
    if sharded_output:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(len(raw) for *_, raw in after.values())
        assert index["weight_map"] == {n: f.name for f in files for n in TensorFile(f).specs}
        assert len(files) > 2
        # Only a tensor that is larger than a shard may make one larger.
        for file in files:
            specs = TensorFile(file).specs
            assert len(specs) == 1 or sum(s.nbytes for s in specs.values()) <= limit
    else:
        assert entries(out) == {"model.safetensors"}


def test_sharded_result_loads(tmp_path: Path, tokenizer: Any, text_file: Path) -> None:
    """Through the whole pipeline from shards, and back through stock transformers."""
    save_tiny_model("qwen3", tmp_path / "source", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "source")
    asked = {"multiple": 1, "data": [str(text_file)], **SETTINGS}
    report = cfsp.prune(tmp_path / "source", out=tmp_path / "out", **asked)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    # The source's index describes the source's shards: it must not travel.
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_digests_of_the_manifest_are_those_of_the_files(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    from hashlib import sha256

    out = tmp_path / "out"
    cfsp.prune(tiny_checkpoint("llama"), out=out, data=[str(text_file)], **SETTINGS)
    manifest = json.loads((out / "cfsp.json").read_text())
    own = {"cfsp.json", "cfsp_plan.json", "cfsp.statistics", "README.md"}
    assert {"config.json", "tokenizer.json", "modeling_cfsp.py"} < set(manifest["files"])
    assert manifest["files"] == {
        name: sha256((out / name).read_bytes()).hexdigest()
        for name in sorted({path.name for path in out.iterdir()} - own)
    }
    assert manifest["plan_digest"] == sha256((out / "cfsp_plan.json").read_bytes()).hexdigest()
    assert manifest["parameters_after"] == sum(
        tensor.numel() for tensor in load_file(out / "model.safetensors").values()
    )


# Whole or not at all.


@pytest.fixture
def pruning(tiny_checkpoint: Callable[[str], Path], text_file: Path) -> Callable[[Path], object]:
    source = tiny_checkpoint("llama")

    def prune(out: Path) -> object:
        return cfsp.prune(source, out=out, data=[str(text_file)], **SETTINGS)

    return prune


def test_failure_in_the_middle_of_surgery_leaves_nothing(
    pruning: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.chunks
    served = []

    def failing(self: Checkpoint, name: str) -> Any:
        served.append(name)
        if len(served) == 5:
            raise CheckpointError("the source ended")
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "chunks", failing)
    with pytest.raises(CheckpointError, match="the source ended"):
        pruning(tmp_path / "out")
    assert len(served) == 5
    assert entries(tmp_path) == set()


def test_full_disk_is_an_output_error_that_the_same_command_goes_on_from(
    pruning: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cfsp.checkpoint.tensor_file as tensor_file

    written = []

    def full(write: Any, chunk: memoryview) -> None:
        written.append(chunk.nbytes)
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        write(chunk)

    monkeypatch.setattr(tensor_file, "_write_all", full)
    with pytest.raises(OutputError, match=r"cannot write .*out: No space left on device"):
        pruning(tmp_path / "out")
    assert entries(tmp_path) == {"out.work"}
    monkeypatch.undo()
    pruning(tmp_path / "out")
    assert entries(tmp_path) == {"out"}


def test_interrupt_leaves_only_the_work_so_far(
    pruning: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Checkpoint, name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "chunks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruning(tmp_path / "out")
    assert entries(tmp_path) == {"out.work"}
    monkeypatch.undo()
    pruning(tmp_path / "out")
    assert entries(tmp_path) == {"out"}


def test_output_that_is_not_empty_is_refused_and_kept(
    pruning: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists and is not empty; choose another"):
        pruning(tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists and is a file"):
        pruning(tmp_path / "file")
    assert entries(tmp_path) == {"out", "file"}


def test_empty_output_directory_is_used(pruning: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pruning(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert entries(tmp_path) == {"out"}


def test_output_inside_the_source_is_refused(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    before = entries(source)
    with pytest.raises(CfspError, match="lies inside the source"):
        cfsp.prune(source, out=source / "out", data=[str(text_file)], **SETTINGS)
    assert entries(source) == before


def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), staged_directory(target) as staging:
        (staging / "ours").write_text("ours")
        target.mkdir()
        (target / "theirs").write_text("theirs")
    assert entries(tmp_path) == {"out"}
    assert entries(target) == {"theirs"}


def test_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "plan.json"
    write_atomically(path, b"first")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert entries(path.parent) == {"plan.json"}
