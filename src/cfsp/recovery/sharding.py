"""Training that gives every process a part of all weights (torch's FSDP2).

A block is whole only while it computes, so that a model and its optimizer take the memory of all
processes together. Checkpoints are torch's distributed ones: any number of processes reads what
another wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cfsp.checkpoint.skeleton import blocks_of
from cfsp.processes import process_count
from cfsp.recovery.trainer import RecoveryTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Architecture

_WEIGHTS, _OPTIMIZER = "weights", "optimizer"
# Frozen weights are those of the model that is recovered.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_WHOLE = replace(_TRAINED, full_state_dict=True, cpu_offload=True)


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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (process_count(),))
    for block in blocks_of(model, architecture):
        fully_shard(block, mesh=mesh)
    # Embeddings, the last norm and the head: what a loss function inside the forward finds whole.
    fully_shard(whole, mesh=mesh)


def trained_tensors(whole: nn.Module) -> dict[str, Any]:
    """Return what training changed, whole and on the CPU, to the first process; all must ask."""
    return get_model_state_dict(whole, options=_WHOLE)


class ShardedTrainer(RecoveryTrainer):
    """A trainer of a model that is sharded already; the arguments are those of its base.

    What it overrides are the Trainer's own places for wrapping, saving and loading. Learning rates
    need no state: they follow the schedule.
    """

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the model in mixed precision, and not in DDP."""
        if not getattr(model, "_is_accelerate_prepared", False):
            model = self.accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained."""
        assert output_dir is not None
        _exchange(save, get_model_state_dict(self.model, options=_TRAINED), output_dir, _WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        _exchange(save, self._optimizer_state(), output_dir, _OPTIMIZER)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = get_model_state_dict(self.model, options=_TRAINED)
        _exchange(load, state, resume_from_checkpoint, _WEIGHTS)
        set_model_state_dict(self.model, state, options=_TRAINED)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = self._optimizer_state()
            _exchange(load, state, checkpoint, _OPTIMIZER)
            set_optimizer_state_dict(self.model, self._plain(), state, options=_TRAINED)

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self._plain(), options=_TRAINED)

    def _plain(self) -> torch.optim.Optimizer:
        """Return the optimizer itself, not accelerate's around it."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found


def _exchange(do: Callable[..., Any], state: dict[str, Any], directory: str, name: str) -> None:
    """Write a state, or fill this process's parts of it from what any number of them wrote."""
    with warnings.catch_warnings():
        # It warns of a process that is alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        do(state, checkpoint_id=Path(directory) / name, no_dist=process_count() == 1)
