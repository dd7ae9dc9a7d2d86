"""The one thing that an engine does, and where to find each engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from cfsp.errors import CheckpointError, UsageError
from cfsp.exports.decilm import is_decilm
from cfsp.speed.subjects import Subject
from cfsp.speed.work import Footprint
from cfsp.speed.workload import Conditions, Timing, Workload

_OF_TRANSFORMERS = ("transformers", "compile")


class Engine(Protocol):
    """A loaded model that runs workloads."""

    footprint: Footprint

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for: versions, dtype, device, threads."""
        ...

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        ...

    def peak_device_bytes(self) -> int:
        """Return the largest memory of an accelerator; 0 on the CPU."""
        ...


def check_engine_reads(subject: Subject, engine: str) -> None:
    """Check that an engine can run a model, as far as names and files tell.

    Raises:
        UsageError: it cannot.
        CheckpointError: the file is missing.
    """
    model, label = subject.model, subject.label
    if not isinstance(model, str | Path):
        if engine not in _OF_TRANSFORMERS:
            raise UsageError(
                f"the engine {engine} cannot run {label}: a true shape runs in "
                f"{' and '.join(_OF_TRANSFORMERS)} only"
            )
        return
    path = Path(model)
    if engine == "llama.cpp" and path.suffix != ".gguf":
        raise UsageError(
            f"the engine {engine} cannot run {label}: it runs .gguf files; make one with: cfsp "
            "export DIR --to gguf"
        )
    if engine == "llama.cpp" and not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; make it with: cfsp export DIR --to gguf --out {path}"
        )
    if engine != "vllm" and is_decilm(path):
        raise UsageError(
            f"the engine {engine} cannot run {label}, which is an export for vLLM; give --engine "
            "vllm, or the checkpoint that was exported"
        )


def start_engine(subject: Subject, conditions: Conditions) -> Engine:
    """Load a subject into an engine.

    Raises:
        MissingExtraError: the engine is not installed.
        CheckpointError: the model is missing, damaged, or nothing that the engine reads.
    """
    check_engine_reads(subject, conditions.engine)
    if conditions.engine in _OF_TRANSFORMERS:
        from cfsp.speed.transformers_engine import TransformersEngine

        return TransformersEngine(subject, conditions)
    if conditions.engine == "llama.cpp":
        from cfsp.speed.llama_cpp_engine import LlamaCppEngine

        return LlamaCppEngine(subject, conditions)
    from cfsp.speed.vllm_engine import VllmEngine

    return VllmEngine(subject, conditions)
