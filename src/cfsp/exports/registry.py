"""The targets by name, and the one way through all of them: write aside, verify, put in place."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cfsp.checkpoint.loading import torch_as_it_starts
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_is_outside, output_path, staged_directory, staged_file
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CannotSayError, ExportError, UsageError, did_you_mean
from cfsp.exports import decilm, gguf, gguf_architecture, openvino
from cfsp.exports.common import Verification, Written
from cfsp.streaming.work_dir import Stopwatch


class Target(NamedTuple):
    """What writes a format into a new directory, or a new file, and what it asks of a model.

    Both raise CannotSayError for what the format cannot express, before anything is written.
    """

    check: Callable[[Checkpoint], None]
    write: Callable[..., Written]


TARGETS = {
    "gguf": Target(gguf_architecture.check, gguf.write),
    "vllm": Target(partial(decilm.check, decilm.VLLM), partial(decilm.write, decilm.VLLM)),
    "mlx-lm": Target(partial(decilm.check, decilm.MLX_LM), partial(decilm.write, decilm.MLX_LM)),
    "openvino": Target(openvino.check, openvino.write),
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
    verification: Verification | None  # None if it was not asked for, or nothing here reads it
    seconds: dict[str, float]  # by stage
    serve: str  # the command that serves the copy; empty if there is none

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


@torch_as_it_starts()
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
        verify: read the copy back, where something here can (llama.cpp, OpenVINO), and compare its
            logits with the model's, in float32.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    if to not in [*TARGETS]:  # which no value is too strange to be compared with
        raise UsageError(
            f"unknown target {to!r}{did_you_mean(to, TARGETS)}; expected one of "
            f"{', '.join(TARGETS)}"
        )
    out, is_file = output_path(out), to == "gguf"
    if is_file and out.suffix != _FILE:
        raise UsageError(f"{to} writes one file: expected a name in {_FILE}, found {out}")
    asked = {"weight_type": weight_type, "pre_tokenizer": pre_tokenizer}
    options = {name: value for name, value in asked.items() if value is not None}
    for name, value in options.items():
        flag, targets = _OPTIONS[name]
        if not isinstance(value, str):
            raise UsageError(f"{flag} must be text, found {value!r}")
        if to not in targets:
            raise UsageError(
                f"{flag} belongs to {' and '.join(targets)}; {to} keeps the checkpoint's own"
            )
    source = open_checkpoint(model)
    check_is_outside(out, source.directory)
    watch = Stopwatch()
    with staged_file(out) if is_file else staged_directory(out) as staging:
        with watch.stage("write"):
            try:
                written = TARGETS[to].write(source, staging, **options)
            except CannotSayError as error:
                raise _with_others(error, source, to) from error
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


def _with_others(error: CannotSayError, source: Checkpoint, to: str) -> ExportError:
    """Return what a format cannot express, with the way out and the other targets that can."""
    able, others = [], TARGETS.keys() - {to}
    if source.config.model_type not in decilm.LIKE_LLAMA:
        others -= {"vllm", "mlx-lm"}  # which run many other stock models, but not all
    for name in others:
        with suppress(CannotSayError):
            TARGETS[name].check(source)
            able.append(f"--to {name}")
    ways = [error.instead] if error.instead else []
    if able:
        ways.append(f"use {' or '.join(sorted(able))}")
    return ExportError(
        f"{error.reason}; {', or '.join(ways or ['transformers runs the checkpoint itself'])}"
    )
