"""The targets by name, and the one way through all of them: write aside, verify, put in place."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_is_outside, staged_directory, staged_file
from cfsp.checkpoint.reading import check_complete
from cfsp.errors import UsageError, did_you_mean
from cfsp.exports import decilm, gguf, openvino
from cfsp.exports.common import Verification, Written
from cfsp.streaming.work_dir import Stopwatch

# Each writes a new directory, gguf a new file, and raises ExportError for what the format cannot
# express before anything is written.
TARGETS: dict[str, Callable[..., Written]] = {
    "gguf": gguf.write,
    "vllm": partial(decilm.write, decilm.VLLM),
    "mlx-lm": partial(decilm.write, decilm.MLX_LM),
    "openvino": openvino.write,
}
_FILE = ".gguf"
# What only some of them can be told, by the names of their arguments.
_OPTIONS = {
    "weight_type": ("--type", ("gguf", "openvino")),
    "pre_tokenizer": ("--pre-tokenizer", ("gguf",)),
}


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    target: str
    out: str
    layout: str  # what software will see
    nbytes: int  # on disk
    notes: list[str]  # what the user should know
    verification: Verification | None  # None if it was not asked for, or no llama.cpp is installed
    seconds: dict[str, float]  # by stage
    serve: str  # the command that serves the copy; empty if there is none

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    weight_type: str | None = None,
    pre_tokenizer: str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a model in the layout that other software reads, and check the copy.

        cfsp.export("smaller", "gguf", "smaller.gguf", weight_type="q8_0")

    Args:
        model: a directory, hub id, .gguf file, or `demo`; pruned or not.
        to: `gguf`, `vllm`, `mlx-lm` or `openvino` (see docs/export.md).
        out: the new directory, or the new .gguf file; must not exist.
        weight_type: gguf: f32, f16, bf16, q8_0, q4_k_m, ...; openvino: f32 or f16; None for the
            model's own.
        pre_tokenizer: gguf: llama.cpp's name of the pre-tokenizer, where it cannot be told.
        verify: read the copy back and compare its logits with the model's, in float32.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"export takes the name of a model, found a {type(model).__name__}")
    if to not in TARGETS:
        raise UsageError(
            f"unknown target {to!r}{did_you_mean(to, TARGETS)}; expected one of "
            f"{', '.join(TARGETS)}"
        )
    out, is_file = Path(out), to == "gguf"
    if is_file and out.suffix != _FILE:
        raise UsageError(f"{to} writes one file: expected a name in {_FILE}, found {out}")
    asked = {"weight_type": weight_type, "pre_tokenizer": pre_tokenizer}
    options = {name: value for name, value in asked.items() if value is not None}
    for flag, targets in (_OPTIONS[name] for name in options):
        if to not in targets:
            raise UsageError(
                f"{flag} belongs to {' and '.join(targets)}; {to} keeps the checkpoint's own"
            )
    source = open_checkpoint(model)
    check_is_outside(out, source.directory)
    check_complete(source)
    watch = Stopwatch()
    with staged_file(out) if is_file else staged_directory(out) as staging:
        with watch.stage("write"):
            written = TARGETS[to](source, staging, **options)
        verification = None
        if verify and written.verify is not None:
            with watch.stage("verify"):
                verification = written.verify()
        files = [staging] if is_file else staging.rglob("*")
        nbytes = sum(file.stat().st_size for file in files if file.is_file())
    return ExportReport(
        to,
        str(out),
        written.layout,
        nbytes,
        written.notes,
        verification,
        dict(watch.seconds),
        written.serve.format(out=shlex.quote(str(out))),
    )
