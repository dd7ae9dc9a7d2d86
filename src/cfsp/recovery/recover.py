"""The flow of a recovery, one line a stage.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.checkpoint.output import check_output_is_free, staged_directory
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import PlanError, RecoveryError, UsageError
from cfsp.evaluation import perplexity
from cfsp.loading import compute_device, load
from cfsp.manifest import PLAN_FILE, Stopwatch, peak_rss_bytes, versions
from cfsp.pruning_plan import PruningPlan
from cfsp.recovery.adaptation import Adaptation, TrainableBlock, attach, merge
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.schedule import ENDLESS_STEPS, Limit, RunClock
from cfsp.recovery.teacher import TeacherChoice, check_teacher, store_top_tokens
from cfsp.recovery.workspace import Workspace
from cfsp.recovery.writing import copy_everything_else, write_record, write_recovered_weights
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import consecutive_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from cfsp.settings import EvaluationText

ADAPTER_DIRECTORY = "adapter"


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        limit: when training ends.
        learning_rate: at its peak; None for what suits the method.
        batch_windows: windows that pass together, on each process.
        accumulate: batches in an optimizer step.
        seqlen: tokens in a window.
        warm_up: part of the run in which the learning rate rises.
        weight_decay: of AdamW.
        evaluations: how often to evaluate and save.
        gradient_checkpointing: recompute activations: less memory, a third more time.
        seed: of the order of windows and of the adapters' start.
    """

    limit: Limit
    learning_rate: float | None = None
    batch_windows: int = 8
    accumulate: int = 1
    seqlen: int = 512
    warm_up: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 10
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_windows", "accumulate", "evaluations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")


DEFAULT_LEARNING_RATES = {"lora": 1e-3, "dora": 1e-3, "full": 3e-4}


@dataclass(frozen=True)
class RecoverReport:
    """What recovery did. Everything is also in the manifest.

    Attributes:
        trainable_parameters: in all.
        blocks: rank and trainable parameters of each block.
        steps: optimizer steps.
        tokens_in_step: tokens of one step, over all processes.
        tokens_per_second: of training, without evaluations.
        history: held-out perplexity and loss at each evaluation.
        best_step: the step whose weights were kept.
        perplexity: text -> {"before", "after", "tokens"}, if it was measured.
        seconds: stage -> seconds.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint.
    """

    trainable_parameters: int
    blocks: list[dict[str, int | None]]
    steps: int
    tokens_in_step: int
    tokens_per_second: float
    history: list[dict[str, float]]
    best_step: int
    perplexity: dict[str, dict[str, float]]
    seconds: dict[str, float]
    peak_rss_bytes: int
    out: str


def recover_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    data: Sequence[str],
    training: Training,
    adaptation: Adaptation | None = None,
    teacher: TeacherChoice | None = None,
    evaluation: EvaluationText | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    keep_adapter: bool = False,
    command: str = "",
) -> RecoverReport:
    """Train a pruned checkpoint and write the result as a plain checkpoint of the same layout.

    Under torchrun every process calls this with the same arguments; the first one writes.

    Args:
        source: the pruned model.
        out: a new directory.
        data: texts and conversations to train on.
        training: how to train.
        adaptation: what to train; None for LoRA by importance.
        teacher: a dense model to distil from.
        evaluation: texts to measure perplexity on, before and after.
        device: where to train.
        dtype: of the weights that are not trained, and of the arithmetic.
        resume: continue an interrupted run of the same arguments.
        keep_adapter: also write the adapter, into `out/adapter`.
        command: what the user typed, for the manifest.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic()
    adaptation = adaptation or Adaptation()
    training = _with_learning_rate(training, adaptation)
    watch = Stopwatch()
    workspace = Workspace(out)
    importance_L = block_importance(source, adaptation)
    if keep_adapter and adaptation.method == "full":
        raise UsageError("--keep-adapter needs --method lora or dora: full training has no adapter")
    tokenizer = load_tokenizer(source.directory)
    with watch.stage("text"):
        text = read_text(data, tokenizer, seqlen=training.seqlen)
    settings = _settings(source, text, training, adaptation, teacher)
    if is_first_process():
        check_output_is_free(out)
        workspace.check(settings, resume=resume)

    torch_device = compute_device(device)
    with watch.stage("load"):
        model = _load_to_train(source, torch_device, dtype)
        dense = None
        if teacher is not None:
            dense = _load_to_train(teacher.name, torch_device, dtype)
            dense_tokenizer = load_tokenizer(Path(dense.config._name_or_path))
            check_teacher(model, tokenizer, dense, dense_tokenizer, teacher.name)
    torch.manual_seed(training.seed)
    adapted, blocks = attach(model, source.family, adaptation, importance_L)
    trained = _trained_tensors(model)
    print_trainable(blocks)

    if is_first_process():
        workspace.open(settings)
    if teacher is not None and teacher.top_k is not None and dense is not None:
        with watch.stage("teacher"):
            text = _with_stored_teacher(text, dense, teacher, workspace)
        dense = None
    with watch.stage("train"):
        outcome = _train(adapted, model, text, training, teacher, dense, workspace, started, resume)
    if not is_first_process():
        return _report(blocks, outcome, {}, watch, out)

    with staged_directory(out) as staging:
        with watch.stage("write"):
            if keep_adapter:
                _save_adapter(adapted, source, staging / ADAPTER_DIRECTORY)
            merged = merge(adapted)
            digests = write_recovered_weights(source, merged, trained, staging)
            copy_everything_else(source, staging)
        del adapted, model, merged, dense
        measured: dict[str, dict[str, float]] = {}
        if evaluation is not None and evaluation.names:
            with watch.stage("evaluate"):
                measured = _before_and_after(source, staging, evaluation, torch_device, dtype)
        report = _report(blocks, outcome, measured, watch, out)
        facts = {
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**versions(), "accelerate": version("accelerate"), **_peft_version()},
            "adaptation": asdict(adaptation),
            "training": asdict(training),
            "teacher": _teacher_facts(teacher),
            "data": {"sources": text.sources, "tokens_digest": text.train.digest},
            "device": str(torch_device),
            "threads": torch.get_num_threads(),
            **asdict(report),
        }
        write_record(source, staging, facts, digests)
    workspace.remove()
    return report


def block_importance(source: Checkpoint, adaptation: Adaptation) -> list[float]:
    """Return the coarse importance of every block, from the plan in the checkpoint.

    Raises:
        RecoveryError: cfsp did not prune the checkpoint, and the adaptation asks for importance.
    """
    blocks = int(source.config.num_hidden_layers)
    if adaptation.method == "full" or adaptation.allocation == "uniform":
        return [1.0] * blocks
    path = source.directory / PLAN_FILE
    if not path.is_file():
        raise RecoveryError(
            f"{source.label} was not pruned by cfsp: it has no {PLAN_FILE} with the importance of "
            "its blocks; recover it with --rank-allocation uniform"
        )
    plan = PruningPlan.load(path)
    if len(plan.blocks) != blocks:
        raise PlanError(
            f"{path} describes {len(plan.blocks)} blocks, the model has {blocks}; "
            "recover it with --rank-allocation uniform"
        )
    return [block.importance for block in plan.blocks]


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def is_first_process() -> bool:
    """Return whether this process is the only one or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_trainable(blocks: Sequence[TrainableBlock]) -> None:
    """Print rank and trainable parameters of every block on standard error."""
    import sys

    if not is_first_process():
        return
    total = sum(block.parameters for block in blocks)
    for index, block in enumerate(blocks):
        rank = f"rank {block.rank:3d}, " if block.rank is not None else ""
        print(f"block {index:3d}: {rank}{block.parameters:12,d} trainable", file=sys.stderr)
    print(f"all blocks: {total:,d} trainable parameters", file=sys.stderr)


def _train(
    adapted: nn.Module,
    model: PreTrainedModel,
    text: RecoveryText,
    training: Training,
    teacher: TeacherChoice | None,
    dense: PreTrainedModel | None,
    workspace: Workspace,
    started: float,
    resume: bool,
) -> dict[str, Any]:
    from cfsp.recovery.reporting import Reporter
    from cfsp.recovery.training import RecoveryTrainer, loss_from_hidden_states

    processes = process_count()
    windows_in_step = training.batch_windows * training.accumulate * processes
    steps = training.limit.in_steps(len(text.train), windows_in_step)
    minutes = training.limit.minutes
    clock = RunClock(steps, minutes * 60 if minutes is not None else None, started)
    tokens_in_step = windows_in_step * training.seqlen
    reporter = Reporter(clock, tokens_in_step, is_first_process())
    last = workspace.last_checkpoint() if resume else None
    model.config.use_cache = False
    with loss_from_hidden_states(model) as loss, _without_bars():
        trainer = RecoveryTrainer(
            adapted,
            _arguments(training, workspace.directory, steps or ENDLESS_STEPS, model),
            text,
            clock=clock,
            loss=loss,
            warm_up=training.warm_up,
            teacher=dense,
            distillation=teacher.distillation if teacher is not None else None,
            evaluations=training.evaluations,
            callbacks=[reporter],
        )
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return {
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "tokens_in_step": tokens_in_step,
        "tokens_per_second": round(reporter.tokens_per_second, 1),
        "history": reporter.history,
    }


def _arguments(
    training: Training, directory: Path, steps: int, model: PreTrainedModel
) -> TrainingArguments:
    from transformers import TrainingArguments

    on_cpu = model.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=training.batch_windows,
        per_device_eval_batch_size=training.batch_windows,
        gradient_accumulation_steps=training.accumulate,
        **_checkpointing(training),
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=model.dtype == torch.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        # The clock decides when; the Trainer only needs to know that it may.
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=ENDLESS_STEPS,
        save_steps=ENDLESS_STEPS,
        logging_strategy="steps",
        logging_steps=10,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_total_limit=2,
        seed=training.seed,
        data_seed=training.seed,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence transformers' own progress bars, one for each checkpoint that is saved."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checkpointing(training: Training) -> dict[str, Any]:
    from transformers import TrainingArguments

    if not training.gradient_checkpointing:
        return {}
    # The newer name is there in versions that warn of the older one.
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _load_to_train(source: Checkpoint | str, device: torch.device, dtype: str) -> PreTrainedModel:
    name = source.directory if isinstance(source, Checkpoint) else source
    model = load(name, dtype=dtype)
    if dtype == "auto" and model.dtype != torch.float32 and not computes_bfloat16(device):
        model = model.float()
    return model.to(device)


def _with_stored_teacher(
    text: RecoveryText, dense: PreTrainedModel, teacher: TeacherChoice, workspace: Workspace
) -> RecoveryText:
    assert teacher.top_k is not None
    if process_count() > 1:
        raise UsageError("--teacher-top-k works in one process; keep the teacher in memory instead")
    vocabulary = int(dense.config.vocab_size)
    if not 1 <= teacher.top_k < vocabulary:
        raise UsageError(f"--teacher-top-k must be in [1, {vocabulary}), found {teacher.top_k}")
    train = store_top_tokens(
        dense, text.train, workspace.directory, teacher.top_k, teacher.distillation.temperature
    )
    return replace(text, train=train)


def _with_learning_rate(training: Training, adaptation: Adaptation) -> Training:
    if training.learning_rate is not None:
        if training.learning_rate <= 0:
            raise UsageError(f"--learning-rate must be positive, found {training.learning_rate}")
        return training
    return replace(training, learning_rate=DEFAULT_LEARNING_RATES[adaptation.method])


def _trained_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names, in the plain model, of the tensors that training will change."""
    full = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    if adapters:
        return [f"{name.removesuffix('.base_layer')}.weight" for name in adapters]
    return full


def _save_adapter(adapted: Any, source: Checkpoint, directory: Path) -> None:
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(source.directory)
    adapted.save_pretrained(str(directory))


def _before_and_after(
    source: Checkpoint, staging: Path, texts: EvaluationText, device: torch.device, dtype: str
) -> dict[str, dict[str, float]]:
    tokenizer = load_tokenizer(source.directory)
    windows = {
        name: consecutive_windows(name, tokenizer, count=texts.windows, seqlen=texts.seqlen)
        for name in texts.names
    }
    measured: dict[str, dict[str, float]] = {name: {} for name in windows}
    for key, directory in (("before", source.directory), ("after", staging)):
        model = load(directory, dtype=dtype, device=device)
        for name, tokens in windows.items():
            result = perplexity(model, tokens, f"{key} on {name}")
            measured[name] |= {key: round(result.value, 4), "tokens": result.tokens}
    return measured


def _settings(
    source: Checkpoint,
    text: RecoveryText,
    training: Training,
    adaptation: Adaptation,
    teacher: TeacherChoice | None,
) -> dict[str, Any]:
    from cfsp.checkpoint.reading import fingerprint

    return {
        "model": fingerprint(source),
        "text": text.train.digest,
        "training": asdict(training),
        "adaptation": asdict(adaptation),
        "teacher": _teacher_facts(teacher),
    }


def _teacher_facts(teacher: TeacherChoice | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {"name": teacher.name, "top_k": teacher.top_k, **asdict(teacher.distillation)}


def _peft_version() -> dict[str, str]:
    try:
        return {"peft": version("peft")}
    except ModuleNotFoundError:
        return {}


def _report(
    blocks: Sequence[TrainableBlock],
    outcome: dict[str, Any],
    measured: dict[str, dict[str, float]],
    watch: Stopwatch,
    out: Path,
) -> RecoverReport:
    return RecoverReport(
        trainable_parameters=sum(block.parameters for block in blocks),
        blocks=[asdict(block) for block in blocks],
        perplexity=measured,
        seconds=dict(watch.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out),
        **outcome,
    )
