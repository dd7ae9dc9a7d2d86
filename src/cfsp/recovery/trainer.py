"""One training run, from an adapted model and windows to trained weights, by transformers' Trainer.

What differs from its defaults, and nothing else:

- The model's loss function is ours (`loss.py`).
- A `Schedule` says when to evaluate, to save and to stop; it may count minutes.
- A loss that is not finite stops the run.
- With `shard` every process holds a part of all weights (torch's FSDP2). A block is whole only
  while it computes, so that a model and its optimizer take the memory of all processes together.
- A checkpoint has what is trained, and its optimizer, as torch's distributed checkpoints, of which
  any number of processes reads what another wrote.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from cfsp.architecture.found import Architecture
from cfsp.checkpoint.output import cannot_write
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.processes import is_first_process, naming_lost_processes, process_count
from cfsp.recovery.data import RecoveryText
from cfsp.recovery.loss import IGNORED, ModelLoss, diverged
from cfsp.recovery.prepare import Prepared
from cfsp.recovery.schedule import Pace, Schedule, rate_factor, saved_pace
from cfsp.recovery.settings import ENDLESS_STEPS, Training
from cfsp.streaming.work_dir import STATE_FILE, PassState, directory_of_process

_WEIGHTS, _OPTIMIZER = "weights", "optimizer"
# What torch.save says where it cannot write: the type of the error is that of many others.
_CANNOT_WRITE = re.compile(
    r"inline_container\.cc|iostream error|Parent directory .* does not exist|cannot be opened"
)
# Frozen weights are those of the model that is recovered.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
WHOLE = replace(_TRAINED, full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class RecoverReport:
    """What recovery did. Everything is also in the manifest."""

    steps: int  # of the optimizer, those before an interruption included
    # The step with the lowest held-out loss, whose weights were kept; 0 where none was lower than
    # before training.
    best_step: int
    tokens_in_step: int  # over all processes
    tokens: int  # of all steps: the last step of a pass over the text may have fewer
    tokens_per_second: float  # of training, without evaluations
    # Step, loss on held-out text (of the same kind) and of training, in nats, at each evaluation,
    # the first before training.
    history: list[dict[str, float]]
    trainable_parameters: int  # in all
    ranks: list[int | None]  # of the adapters in each block; None in full training
    # Text -> {"before", "after", "tokens", "windows", "seqlen", "bos"}, if it was measured.
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    peak_rss_bytes: int = 0  # of the process
    out: str = ""  # the new checkpoint


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with our schedule and the loss function that the model was given.

    The model may be sharded already. Learning rates need no state: they follow the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        text: RecoveryText,
        pace: Pace,
        loss: ModelLoss,
    ) -> None:
        data = {"train_dataset": text.train, "eval_dataset": text.held_out}
        # One process trains on one accelerator of several; what a teacher thinks is not split.
        args._n_gpu = min(1, args.n_gpu)
        super().__init__(model, args, callbacks=[pace], **data)
        # `Pace` prints instead.
        self.remove_callback(PrinterCallback)
        self._pace, self._loss = pace, loss
        self._held_out_labels = float((text.held_out.label_NT != IGNORED).sum(1).float().mean())

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        # Each writer has its own; the last is around any of any process, an interruption, too.
        except (OSError, RuntimeError, CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):
                cause, _ = next(iter(error.failures.values()))
            is_other = isinstance(cause, RuntimeError) and not _CANNOT_WRITE.search(str(cause))
            if is_other or not isinstance(cause, Exception):
                raise cause from None
            raise cannot_write(Path(self.args.output_dir), cause) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained."""
        assert output_dir is not None
        _exchange(save, self._trained_weights(), output_dir, _WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        _exchange(save, self._optimizer_state(), output_dir, _OPTIMIZER)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        _exchange(load, self._trained_weights(), resume_from_checkpoint, _WEIGHTS)

    def _load_best_model(self) -> None:
        # Its path may be one from another working directory.
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        self._load_from_checkpoint(str(Path(self.args.output_dir) / best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = self._optimizer_state()
            # What had no gradient before, such as adapters of what is never called, had no state.
            saved = FileSystemReader(Path(checkpoint) / _OPTIMIZER).read_metadata()
            state["state"] = {
                name: values
                for name, values in state["state"].items()
                if f"state.{name}.step" in saved.state_dict_metadata
            }
            _exchange(load, state, checkpoint, _OPTIMIZER)
            set_optimizer_state_dict(self.model, self._plain, state, options=_TRAINED)

    def _trained_weights(self) -> dict[str, Any]:
        """The weights themselves: what is read is read into them."""
        # Not by the option: a frozen one that is tied has a second name, which stays.
        trained = [name for name, each in self.model.named_parameters() if each.requires_grad]
        found = get_model_state_dict(self.model)
        return {name: found[name] for name in trained}

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self._plain, options=_TRAINED)

    @property
    def _plain(self) -> Any:
        """The optimizer itself, not accelerate's around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return a sharded model in mixed precision, and not in DDP."""
        if not isinstance(model, FSDPModule):
            return super()._wrap_model(model, *args, **kwargs)
        if not getattr(model, "_is_accelerate_prepared", False):
            model = self.accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return learning rates that follow the schedule."""
        schedule = self._pace.schedule
        rates = LambdaLR(
            optimizer or self.optimizer,
            lambda step: schedule.rate_scale * rate_factor(schedule.fraction),
        )
        self.lr_scheduler = rates
        # As in the Trainer's own method: a later train() makes a new one.
        self._created_lr_scheduler = True
        return rates

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, of held-out text the same that training lowers.

        The Trainer averages an evaluation over windows, however many labels each has. With the same
        count for all of them that is the mean over labels, for batches of any size.
        """
        self._loss.labels_in_window = None if model.training else self._held_out_labels
        num_items_in_batch = num_items_in_batch if model.training else None
        self._loss.taught = self._loss.ask(inputs["input_ids"], again=not model.training)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and stop if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            step = self.state.global_step + 1
            raise diverged(step, "the loss", in_bfloat16=self.args.bf16)
        return loss


def last_checkpoint(directory: Path) -> tuple[Path, TrainerState] | None:
    """Return the newest complete checkpoint; a killed process may have left half of one."""
    complete = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with suppress(OSError, ValueError, TypeError):  # the state is written last
            state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
            complete[state.global_step] = path, state
    return complete[max(complete)] if complete else None


def shard(
    whole: nn.Module, model: PreTrainedModel, architecture: Architecture, device: torch.device
) -> None:
    """Leave every process a part of each weight; one process alone keeps them all.

    `whole` is what is called, the model itself or a PEFT model around it. The model is on the CPU;
    its blocks go to the device one after the other.
    """
    if process_count() == 1:
        whole.to(device)
        return
    mesh = init_device_mesh(device.type, (process_count(),))
    for block in blocks_of(model, architecture):
        fully_shard(block, mesh=mesh)
    # Embeddings, the last norm and the head: what a loss function inside the forward finds whole.
    fully_shard(whole, mesh=mesh)


def _exchange(do: Callable[..., Any], state: dict[str, Any], directory: str, name: str) -> None:
    """Write a state, or fill this process's parts of it from what any number of them wrote."""
    with warnings.catch_warnings():
        # It warns of a process that is alone, and of half a checkpoint that a killed run left.
        for said in ("torch.distributed is disabled", "Detected an existing checkpoint"):
            warnings.filterwarnings("ignore", said, UserWarning)
        do(state, checkpoint_id=Path(directory) / name, no_dist=process_count() == 1)


def train(adapted: Any, ready: Prepared, schedule: Schedule, loss: ModelLoss) -> RecoverReport:
    """Train, and leave the model with the weights of its best evaluation; say what that did.

    That is a causal LM, or a PEFT model around it, sharded if that is asked, which was given the
    loss function. A killed run goes on from the Trainer's checkpoints in its work directory.
    """
    directory = directory_of_process(ready.out) / "train"
    # Without a state, what lies there is not complete, and the first process removes it.
    last = last_checkpoint(directory) if (directory / STATE_FILE).is_file() else None
    # The others make nothing there: the first may not have the lock yet.
    work = PassState(directory, ready.identity) if is_first_process() else None
    training, steps = ready.settings.training, schedule.most_steps
    pace = Pace(schedule, work)
    adapted.config.use_cache = False
    adapted.main_input_name = "input_ids"  # of which the Trainer counts tokens
    with _as_it_was():
        arguments = training_arguments(training, directory, steps, adapted, begins=last is None)
        trainer = RecoveryTrainer(adapted, arguments, ready.text, pace, loss)
        with naming_lost_processes():
            if last is not None and saved_pace(last[1])["fraction"] >= 1:
                # Stopped after its last step: the Trainer itself would train for one more.
                trainer.state = last[1]
                pace.take_up(trainer.state)
                trainer._load_best_model()
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
    best_step = trainer.state.best_global_step
    held_out = {entry["step"]: entry["held_out"] for entry in pace.history}
    return RecoverReport(
        steps=trainer.state.global_step,
        best_step=best_step if held_out[best_step] < held_out[0] else 0,
        tokens_in_step=min(training.windows_in_step, len(ready.text.train)) * training.seqlen,
        tokens=trainer.state.num_input_tokens_seen,
        tokens_per_second=round(pace.tokens_per_second, 1),
        history=pace.history,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        ranks=ready.rank_L,
        out=str(ready.out),
    )


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Keep from the code around a call what a Trainer sets for the whole process.

    That is which messages transformers shows, and what accelerate knows of the devices: nobody
    could have an `Accelerator` of another kind afterwards, and one from before would be another.
    """
    shown = logging.get_verbosity()
    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        logging.set_verbosity(shown)
        for state, known in zip(states, before, strict=True):
            state.clear()
            state.update(known)


def training_arguments(
    training: Training, directory: Path, steps: int, model: PreTrainedModel, *, begins: bool
) -> TrainingArguments:
    """Return the Trainer's arguments for a run of at most `steps` steps that begins or goes on."""
    on_cpu = model.device.type == "cpu"
    checkpointing: dict[str, Any] = {}
    if training.gradient_checkpointing:
        # The newer name is there in versions that warn of the older one.
        known = {each.name for each in fields(TrainingArguments)}
        name = "activation_checkpointing"
        name = name if name in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=training.batch_windows,
        per_device_eval_batch_size=training.batch_windows,
        **checkpointing,
        learning_rate=training.learning_rate,
        optim="adamw_torch_fused",
        bf16=model.dtype == torch.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        # The held-out loss before training is what every later one is compared with.
        eval_on_start=begins,
        # The clock decides when; the Trainer only needs to know that it may.
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=ENDLESS_STEPS,
        save_steps=ENDLESS_STEPS,
        logging_steps=10,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen=True,
        load_best_model_at_end=True,
        save_total_limit=2,
        seed=training.seed,
        data_seed=training.seed,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
