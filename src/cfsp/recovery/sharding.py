"""Training that gives every process a part of all weights (torch's FSDP2).

A block is whole only while it computes, so that a model and its optimizer take the memory of all
processes together. Checkpoints are torch's distributed ones: any number of processes reads what
another wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
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

_WEIGHTS, _OPTIMIZER, _SCHEDULER = "weights", "optimizer", "scheduler.pt"
# Frozen weights are those of the model that is recovered.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def shard(
    whole: nn.Module, model: PreTrainedModel, architecture: Architecture, device: torch.device
) -> None:
    """Leave every process a part of each weight; one process alone keeps them all.

    Args:
        whole: what is called: the model itself or a PEFT model around it.
        model: the causal LM inside, on the CPU; its blocks go to the device one after the other.
        architecture: of the model.
        device: where it computes.
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


def trained_tensors(whole: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """Return what training changed, whole and on the CPU; every process must call this.

    Args:
        whole: as for `shard`.
        keeps: whether this process gets it; the others get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            tensor: Any = parameter.detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if keeps:
                found[name] = tensor.cpu()
    return found


class ShardedTrainer(RecoveryTrainer):
    """A trainer of a model that is sharded already; the arguments are those of its base.

    What it overrides are the Trainer's own places for wrapping, saving and loading.
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
        state = get_model_state_dict(self.model, options=_TRAINED)
        with _alone_or_not() as no_dist:
            save(state, checkpoint_id=Path(output_dir) / _WEIGHTS, no_dist=no_dist)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        directory = Path(output_dir)
        state = get_optimizer_state_dict(self.model, self._optimizer, options=_TRAINED)
        with _alone_or_not() as no_dist:
            save(state, checkpoint_id=directory / _OPTIMIZER, no_dist=no_dist)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), directory / _SCHEDULER)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = get_model_state_dict(self.model, options=_TRAINED)
        _load_into(state, Path(resume_from_checkpoint) / _WEIGHTS)
        set_model_state_dict(self.model, state, options=_TRAINED)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory = Path(checkpoint)
        state = get_optimizer_state_dict(self.model, self._optimizer, options=_TRAINED)
        _load_into(state, directory / _OPTIMIZER)
        set_optimizer_state_dict(self.model, self._optimizer, state, options=_TRAINED)
        self.lr_scheduler.load_state_dict(torch.load(directory / _SCHEDULER, weights_only=True))

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, not accelerate's around it."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found


def _load_into(state: dict[str, Any], directory: Path) -> None:
    """Fill this process's parts of a state from what any number of processes wrote."""
    with _alone_or_not() as no_dist:
        load(state, checkpoint_id=directory, no_dist=no_dist)


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Give whether this process is alone, of which torch would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield process_count() == 1
