"""Our reading and writing of safetensors, against the safetensors library both ways."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfsp.checkpoint.tensor_file import (
    DTYPES,
    MadeTensor,
    TensorSpec,
    read_tensor_file,
    write_tensor_file,
)
from cfsp.errors import ChangedFileError, CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator) * 3
    tensors = {f"t.{name}": values.to(dtype) for name, dtype in DTYPES.items()}
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["column major"] = torch.randn(4, 3, generator=generator).t().contiguous()
    return tensors


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and (a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8)))
    )


def test_the_library_reads_what_we_write(tmp_path):
    tensors = some_tensors()
    outgoing = {name: MadeTensor.of(tensor) for name, tensor in tensors.items()}
    digest = write_tensor_file(tmp_path / "a.safetensors", outgoing)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_we_read_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = read_tensor_file(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].spec == TensorSpec(tensor.dtype, tuple(tensor.shape))
        assert same_bytes(stored[name].read(), tensor)
        raw = b"".join(bytes(piece) for piece in stored[name].chunks())
        assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for start, stop in ((0, 7), (3, 9), (0, tensor.numel())):
            stop = min(stop, tensor.numel())
            if start <= stop:
                part = stored[name].read_part(start, stop)
                assert same_bytes(part, tensor.reshape(-1)[start:stop])


def test_large_tensors_come_in_pieces(tmp_path):
    big = torch.arange(9_000_000, dtype=torch.float32)
    save_file({"big": big}, tmp_path / "a.safetensors")
    stored = read_tensor_file(tmp_path / "a.safetensors")["big"]
    pieces = [piece.nbytes for piece in stored.chunks()]
    assert len(pieces) > 1
    assert max(pieces) <= 16 << 20
    assert sum(pieces) == big.nbytes


def test_bytes_that_contradict_the_header_are_our_bug(tmp_path):
    spec = TensorSpec(torch.float32, (3,))
    lying = MadeTensor(spec, lambda: torch.zeros(2))
    with pytest.raises(AssertionError):
        write_tensor_file(tmp_path / "a.safetensors", {"t": lying})


# Damaged files: one sentence that names the file.


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nothing", b"", "invalid JSON"),
    "a dtype that nobody has": ({"t": entry(0, 8, [2], "F1")}, bytes(8), "unknown variant `F1`"),
    "a dtype that is not read": ({"t": entry(0, 16, [2], "C64")}, bytes(16), "C64, expected one"),
    "too few bytes for its shape": ({"t": entry(0, 8, [3])}, bytes(8), "invalid shape"),
    "huge shape": ({"t": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8), "overflow"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "tensor `b`"),
    "more data than announced": ({"t": entry(0, 8)}, bytes(12), "not fully covered"),
    "less data than announced": ({"t": entry(0, 8)}, bytes(4), "not fully covered"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused(tmp_path, lie):
    header, data, expected = LIES[lie]
    path = write_raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_tensor_file(path)
    assert "a.safetensors" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("keep", [None, 0, 3, 8, 40, -1, -100])
def test_truncated_and_missing_files_are_named(tmp_path, keep):
    path = tmp_path / "model-00002-of-00003.safetensors"
    if keep is not None:
        save_file(some_tensors(), path)
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        read_tensor_file(path)


def replace(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [Path.write_bytes, replace])
@pytest.mark.parametrize("length", [500, None], ids=["shorter", "same size"])
def test_file_that_changes_after_opening_is_an_error(tmp_path, change, length):
    path = tmp_path / "a.safetensors"
    save_file({"t": torch.zeros(1000)}, path)
    os.utime(path, ns=(0, 1))  # it was written long ago
    tensor = read_tensor_file(path)["t"]
    pieces = tensor.chunks()
    assert not tensor.read().any()
    save_file({"t": torch.ones(1000)}, tmp_path / "b.safetensors")
    change(path, (tmp_path / "b.safetensors").read_bytes()[:length])
    for read in (tensor.read, lambda: tensor.read_part(0, 4), lambda: list(pieces)):
        with pytest.raises(CheckpointError, match=r"a.safetensors was changed while it was read"):
            read()


def test_file_that_vanishes_after_opening_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"t": torch.zeros(10)}, path)
    tensor = read_tensor_file(path)["t"]
    path.unlink()
    for read in (tensor.read, lambda: tensor.read_part(0, 4)):
        with pytest.raises(ChangedFileError, match=r"a.safetensors could be read before and now"):
            read()
