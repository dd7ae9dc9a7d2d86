"""Our loss as the loss function of a transformers model.

The loss is computed inside the model's forward, through its own hook for that, so that gradient
accumulation, DDP and FSDP work as for any model. Where logits are the head's product and nothing
more, the head is made to let the hidden states pass and the loss makes logits slice by slice
(`loss.py`). A model that caps, scales or shifts its logits keeps its head and pays for whole
logits.

Shapes: B windows, T tokens, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.discovery import find_architecture
from cfsp.engine.decoder_end import text_model
from cfsp.errors import UnsupportedModelError
from cfsp.recovery.loss import (
    Teacher,
    TeacherHidden,
    TeacherLogits,
    language_model_loss,
    whole_logits_loss,
)
from cfsp.recovery.settings import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelLoss(ABC):
    """A loss function for a causal LM.

    Attributes:
        teacher: what to distil from in the next call; None for the labels alone.
        distillation: how.
        labels_in_window: what a window counts as having in the next call; None for what it has.
    """

    def __init__(self) -> None:
        self.teacher: Teacher | None = None
        self.distillation: Distillation | None = None
        self.labels_in_window: float | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean loss over labels.

        Args:
            logits: what the model's head returned, [B, T, D or V].
            labels: token ids, [B, T]; the first of a window counts for nothing.
            vocab_size: not needed.
            num_items_in_batch: labels of the whole step; None for those of this batch.
            kwargs: what transformers hands to other losses.
        """
        label_N = labels[:, 1:].flatten()
        loss = self._summed(logits[:, :-1].flatten(0, 1), label_N)
        count: Tensor | float | None = num_items_in_batch
        if self.labels_in_window is not None:
            count = len(labels) * self.labels_in_window
        elif count is None:
            count = (label_N >= 0).sum().clamp_min(1)
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    @abstractmethod
    def ask(self, teacher: PreTrainedModel, token_BT: Tensor) -> Teacher:
        """Return what a teacher in memory thinks of tokens 1 to T."""

    @abstractmethod
    def _summed(self, output: Tensor, label_N: Tensor) -> Tensor: ...


class SlicedLoss(ModelLoss):
    """For a model whose head lets hidden states pass.

    Args:
        head: the output embedding, whose weight makes the logits.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head: Any = head

    def ask(self, teacher: PreTrainedModel, token_BT: Tensor) -> Teacher:
        """Return the teacher's hidden states; its logits are made slice by slice too."""
        model: Any = teacher
        head: Any = teacher.get_output_embeddings()
        with torch.no_grad():  # the head lets them pass
            hidden_BTD = model(input_ids=token_BT, use_cache=False).logits
        return TeacherHidden(hidden_BTD[:, :-1].flatten(0, 1), head.weight)

    def _summed(self, output: Tensor, label_N: Tensor) -> Tensor:
        head_VD = self._head.weight
        return language_model_loss(output, head_VD, label_N, self.teacher, self.distillation)


class WholeLoss(ModelLoss):
    """For a model that does more than multiply by its head."""

    def ask(self, teacher: PreTrainedModel, token_BT: Tensor) -> Teacher:
        """Return the teacher's logits."""
        model: Any = teacher
        with torch.no_grad():
            logit_BTV = model(input_ids=token_BT, use_cache=False).logits
        return TeacherLogits(logit_BTV[:, :-1].flatten(0, 1))

    def _summed(self, output: Tensor, label_N: Tensor) -> Tensor:
        return whole_logits_loss(output, label_N, self.teacher, self.distillation)


@contextmanager
def loss_inside(
    model: PreTrainedModel, teacher: PreTrainedModel | None = None
) -> Iterator[ModelLoss]:
    """Give a causal LM our loss function for as long as the context lasts.

    Args:
        model: the causal LM.
        teacher: a dense model in memory, which must allow slices too if slices are to be used.

    Raises:
        UnsupportedModelError: the class of one cannot run on text alone.
    """
    for each in (model, teacher):
        if each is not None:
            _check_runs_on_text(each)
    sliced = all(multiplies_only(m) for m in (model, teacher) if m is not None)
    heads: list[Any] = [m.get_output_embeddings() for m in (model, teacher) if m is not None]
    loss = SlicedLoss(heads[0]) if sliced else WholeLoss()
    model.loss_function = loss
    for head in heads if sliced else ():
        head.forward = _pass
    try:
        yield loss
    finally:
        del model._loss_function
        for head in heads if sliced else ():
            del head.forward


def _check_runs_on_text(model: PreTrainedModel) -> None:
    """Check that the class of a multimodal model, with a causal LM inside, runs on text alone.

    Raises:
        UnsupportedModelError: it does not, as that of Llama 4 in transformers 5.24.
    """
    import transformers

    whole: Any = model
    if text_model(model) is model:
        return
    try:
        with torch.no_grad():
            whole(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be trained on text: its own forward fails in "
            f"transformers {transformers.__version__} ({type(error).__name__}: {error})"
        ) from error


def multiplies_only(model: PreTrainedModel) -> bool:
    """Return whether a model's logits are its last hidden states times its head's weight.

    It is asked, with two tokens, rather than known by its name.
    """
    head: Any = model.get_output_embeddings()
    callable_model: Any = model
    base = _without_head(model)
    if getattr(head, "bias", None) is not None or model.training:
        return False
    token_BT = torch.tensor([[0, 1]], device=model.device)
    # Trained tensors are float32 between others in bfloat16, as in training itself.
    mixed = torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16)
    head.forward = _pass
    try:
        with torch.no_grad(), mixed:
            passed_BTD = callable_model(input_ids=token_BT, use_cache=False).logits
            hidden_BTD = base(input_ids=token_BT, use_cache=False).last_hidden_state
    finally:
        del head.forward
    return torch.equal(passed_BTD, hidden_BTD)


def _without_head(model: PreTrainedModel) -> Any:
    """Return the part of a causal LM that gives the last hidden states."""
    base = model.base_model
    # Where the prefix of its names is that of a multimodal model around it, it is its own base.
    return model.get_submodule(find_architecture(model).decoder) if base is model else base


def _pass(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD
