"""Time models by name against each other: what `cfsp bench` and `cfsp.bench` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from cfsp.checkpoint.locating import locate_model
from cfsp.errors import CheckpointError, UsageError
from cfsp.exports.decilm import is_decilm
from cfsp.result.names import short_names
from cfsp.speed.measuring import Comparison, compare_speed
from cfsp.speed.process import OF_TRANSFORMERS
from cfsp.speed.subjects import ShapedModel, Subject
from cfsp.speed.work import Conditions, Workload

# With a static cache the second run compiles once more: the cache then exists already.
_WARMUPS = {"compile": 3}


def bench(
    models: str | Path | ShapedModel | Sequence[str | Path | ShapedModel],
    *,
    batch: int | Sequence[int] = 1,
    prompt: int | Sequence[int] = 512,
    new_tokens: int | Sequence[int] = 32,
    engine: str = "transformers",
    rounds: int = Conditions.rounds,
    disturbance: float = Conditions.disturbance,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> Comparison:
    """Time models against each other, in turns, each in a process of its own.

    The processes import the script that calls this: call it under `if __name__ == "__main__":`.

    Args:
        models: one or several: as for prune (for llama.cpp .gguf files only), or shapes
            (`ShapedModel`); ratios are to the first.
        batch: sequences at once; several are timed one after the other.
        prompt: prompt tokens of each; likewise.
        new_tokens: tokens generated for each; likewise.
        engine: transformers, compile or llama.cpp.
        rounds: timed runs of each model.
        disturbance: a round is measured again while other programs take more than this fraction
            of the processors.
        threads: of each process; None for the engine's own choice.
        device: cpu, cuda, mps or auto.
        dtype: auto for the model's own, or bfloat16 for a shape.

    Returns:
        Sizes, speeds with their ratios round by round, and peak memory; `to_json()` for a file.

    Raises:
        UsageError: a number is out of range, or the engine does not read such models.
        CheckpointError: there is no such model, or it is damaged.
        MissingExtraError: the engine is not installed.
    """
    if isinstance(models, str | Path | ShapedModel):
        models = [models]
    if not models:
        raise UsageError("expected at least one model to time")
    axes = [(v,) if isinstance(v, int) else tuple(v) for v in (batch, prompt, new_tokens)]
    workloads = [Workload(*values) for values in product(*axes)]
    warmups = _WARMUPS.get(engine, Conditions.warmups)
    conditions = Conditions(engine, warmups, rounds, disturbance, device, dtype, threads)
    names = [m.label if isinstance(m, ShapedModel) else str(m) for m in models]
    short = short_names(names, least=1)
    subjects = [Subject(model, short[name]) for model, name in zip(models, names, strict=True)]
    for subject in subjects:
        _check_engine_reads(subject, engine)
    if engine != "llama.cpp":  # it reads a .gguf file itself; for others it is converted once
        subjects = [
            replace(each, model=locate_model(each.model))
            if isinstance(each.model, str | Path)
            else each
            for each in subjects
        ]
        for subject in subjects:  # what lay on the hub is here now
            _check_engine_reads(subject, engine)
    return compare_speed(subjects, workloads, conditions)


def _check_engine_reads(subject: Subject, engine: str) -> None:
    """Check that an engine can run a model, as far as names and files tell."""
    model, label = subject.model, subject.label
    if not isinstance(model, str | Path):
        if engine not in OF_TRANSFORMERS:
            raise UsageError(
                f"the engine {engine} cannot run {label}: a true shape runs in "
                f"{' and '.join(OF_TRANSFORMERS)} only"
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
    if is_decilm(path):
        raise UsageError(
            f"the engine {engine} cannot run {label}, which is an export for vLLM; time it with "
            f"vllm bench latency --model {path} --trust-remote-code, or give the checkpoint that "
            "was exported"
        )
