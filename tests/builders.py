"""Values that several tests build: random FFN weights, statistics, plans, windows; tensors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cfsp.calibration.observed import (
    BlockStatistics,
    CalibrationRecord,
    ObservedBlock,
    UnitStatistics,
)
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import (
    Checkpoint,
    FFNWeights,
    LoadedModel,
    WeightSource,
)
from cfsp.checkpoint.tensor_file import specs_of
from cfsp.job import Job
from cfsp.planning.candidate import Dropped, DropSizes
from cfsp.planning.make import parameters_of_channels
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.settings import (
    UNIT_PARTS,
    Budget,
    CalibrationText,
    Part,
    PruneSettings,
    TargetParameters,
    Text,
)
from cfsp.streaming.runtime import runtime_of
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.drawing import draw_left_over, draw_text
from cfsp.text.windows import Windows

RECORD = CalibrationRecord(
    model="tiny", fingerprint="0" * 32, sources={"text": 4}, tokens_digest="1" * 64, windows=4,
    seqlen=16, seed=0, dtype="float32", device="cpu", bos=False,
)  # fmt: skip

# What a plan says of itself besides its blocks.
CRITERION = {
    "block_metric": "angular", "channel_metric": "relative", "sparsity": 0.5, "of": "ffn",
    "multiple": 1,
}  # fmt: skip
CALIBRATION = asdict(RECORD)


def random_tokens(windows: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids (windows x length) that no tiny model has a meaning for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 290, (windows, length), generator=generator)


def random_weights(hidden: int, width: int, seed: int = 0, gate: bool = True) -> FFNWeights:
    """Return random FFN matrices whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    scale_F = torch.rand(width, generator=generator) + 0.1
    down_DF = torch.randn(hidden, width, generator=generator) * scale_F
    up_FD = torch.randn(width, hidden, generator=generator) * scale_F.flip(0)[:, None]
    gate_FD = torch.randn(width, hidden, generator=generator)
    return FFNWeights(down_DF, up_FD, gate_FD if gate else None)


def random_unit_statistics(width: int, seed: int = 0, block: int = 0) -> UnitStatistics:
    """Return the statistics of random activations of 64 tokens."""
    generator = torch.Generator().manual_seed(seed)
    act_TF = torch.randn(64, width, generator=generator, dtype=torch.float64)
    act_TF = act_TF * torch.rand(width, generator=generator).double() + 0.05
    return UnitStatistics(block, act_TF.square().sum(0), 64)


def random_block(width: int, seed: int = 0, distance: float = 0.1, block: int = 0) -> ObservedBlock:
    """Return the statistics of a block with one FFN."""
    own = BlockStatistics(64 * distance, 64)  # 64: exact
    return ObservedBlock(own, (random_unit_statistics(width, seed, block),))


def statistics_with_distances(distance_L: Sequence[float]) -> Statistics:
    """Return statistics whose blocks have these angular distances."""
    blocks = [random_block(8, block, distance, block) for block, distance in enumerate(distance_L)]
    return Statistics.of(blocks, RECORD)


def raising(error: BaseException) -> Callable[..., Any]:
    """Return what fails whenever it is called."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def never(*_: Any, **__: Any) -> Any:
    """Be what is not to be called."""
    raise AssertionError("this is not needed")


def stop(*_: Any, **__: Any) -> Any:
    """Stand in for a user who stops a run."""
    raise KeyboardInterrupt


def stopped_at(place: str, work: Callable[..., object], *args: Any, **options: Any) -> None:
    """Let a user stop some work where it calls the function at a place."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, stop)
        work(*args, **options)


def job_of(
    source: WeightSource,
    settings: PruneSettings,
    draw: Any = never,
    *,
    work_dir: WorkDir | None = None,
) -> Job:
    """Return a job on given windows, at a place that nothing resumes from."""
    runtime = runtime_of(settings.compute, source)
    return Job(source, settings, never, draw, runtime, work_dir or WorkDir(Path()))


def parts_of(dropped: Dropped) -> tuple[Part, ...]:
    """Return of which parts something goes."""
    gone: dict[Part, tuple[int, ...]] = {"attention": dropped.attentions, "blocks": dropped.blocks}
    return tuple(part for part, blocks in gone.items() if blocks)


def plan_of(*units: UnitPlan, removed: tuple[int, ...] = (), **criterion: Any) -> PruningPlan:
    """Return a plan of a model that is nowhere."""
    identity = ModelIdentity("m", "llama", "f")
    return PruningPlan(identity, CRITERION | criterion, CALIBRATION, units, removed)


def plan_keeping(
    source: WeightSource, kept_U: Sequence[tuple[int, ...]], dropped: Dropped
) -> PruningPlan:
    """Return the plan by which these channels of every unit stay, but for what goes whole."""
    units = tuple(
        UnitPlan(
            unit.block, unit.width, () if dropped.takes(unit) else kept, 0.1, 0.5, unit.ffns,
            path=unit.path, part=unit.part,
        )
        for unit, kept in zip(source.units, kept_U, strict=True)
    )  # fmt: skip
    criterion = {**CRITERION, "parts": list(parts_of(dropped))}
    return PruningPlan(ModelIdentity.of(source), criterion, CALIBRATION, units, dropped.blocks)


def plan_without(source: WeightSource, dropped: Dropped) -> PruningPlan:
    """Return the plan by which blocks and attention layers go, and nothing else."""
    return plan_keeping(source, [tuple(range(u.ffns * u.width)) for u in source.units], dropped)


def goal_of_share(
    model: Path | PreTrainedModel, parts: tuple[Part, ...], share: float
) -> TargetParameters:
    """Return the goal by which as many parameters go as a share of all that the parts own."""
    is_path = isinstance(model, Path)
    source = Checkpoint(model, parts=parts) if is_path else LoadedModel(model, parts)
    whole = Budget(parts=parts).whole_part
    owned = DropSizes.of(source, whole).total if whole else 0
    if whole != "blocks":
        owned += parameters_of_channels(source, [part for part in UNIT_PARTS if part in parts])
    return TargetParameters(1 - share * owned / source.parameter_count)


def numpy_divergence(dense_TV: Tensor, other_TV: Tensor) -> NDArray[Any]:
    """Return KL(dense || other) at every position, of two models' logits."""
    log_p, log_q = (
        logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for logits in (dense_TV.double().numpy(), other_TV.double().numpy())
    )
    found: NDArray[Any] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return found


def draw_windows(texts: Sequence[str | Text], tokenizer: Any, **choices: Any) -> Windows:
    """Draw calibration windows of texts by name; `choices` are those of `CalibrationText`."""
    return draw_text(CalibrationText(tuple(texts), **choices), tokenizer)


def windows_left_over(
    texts: Sequence[str | Text], tokenizer: Any, count: int, **choices: Any
) -> Windows:
    """Draw windows that `draw_windows` with the same choices does not draw."""
    return draw_left_over(CalibrationText(tuple(texts), **choices), tokenizer, count)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in one file."""
    return load_file(directory / "model.safetensors")


def entries(directory: Path) -> set[str]:
    """Return the names of what lies in a directory."""
    return {path.name for path in directory.iterdir()}


def need_openvino() -> None:
    """Skip a test, or a module, without openvino; importing it here would be reported."""
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install '.[openvino]'", allow_module_level=True)


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file and leave its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    change(found)
    save_file(found, path, metadata=metadata)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of a JSON file."""
    fields = read_json(path)
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of the tensors that differ; names, shapes and types must be the same."""
    old, new = tensors(before), tensors(after)
    assert specs_of(old) == specs_of(new)
    return {name for name in old if not torch.equal(old[name], new[name])}
