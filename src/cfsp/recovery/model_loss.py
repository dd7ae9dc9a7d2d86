"""Our loss as the loss function of a transformers model.

The loss is computed inside the model's forward, through its own hook for that, so that gradient
accumulation, DDP and FSDP work as for any model. Where logits are the head's product and nothing
more, the head is made to let the hidden states pass and the loss makes logits slice by slice
(`loss.py`). A model that caps, scales or shifts its logits keeps its head and pays for whole ones.

Shapes: B windows, T tokens, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.discovery import find_architecture
from cfsp.engine.decoder_end import text_model
from cfsp.errors import UnsupportedModelError
from cfsp.recovery.loss import Outputs, language_model_loss
from cfsp.recovery.settings import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelLoss:
    """A loss function for a causal LM.

    Args:
        head: the output embedding, which lets hidden states pass; None where logits come whole.
        teacher: a dense model in memory, with a head of the same kind.
        distillation: how much the teacher counts.

    Attributes:
        taught: what to distil from in the next call; None for the labels alone.
        labels_in_window: what a window counts as having in the next call; None for what it has.
    """

    def __init__(
        self, head: nn.Module | None, teacher: PreTrainedModel | None, distillation: Distillation
    ) -> None:
        self.taught: Outputs | None = None
        self.labels_in_window: float | None = None
        self._head = head
        self._teacher: Any = teacher
        self._distillation = distillation

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
        own = _outputs(logits, self._head)
        loss = language_model_loss(own, label_N, self.taught, self._distillation)
        count: Tensor | float | None = num_items_in_batch
        if self.labels_in_window is not None:
            count = len(labels) * self.labels_in_window
        elif count is None:
            count = (label_N >= 0).sum().clamp_min(1)
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def ask(self, token_BT: Tensor) -> Outputs | None:
        """Return what the teacher thinks of tokens 1 to T; None without one."""
        if self._teacher is None:
            return None
        with torch.no_grad():
            output_BTD = self._teacher(input_ids=token_BT, use_cache=False).logits
        head = None if self._head is None else self._teacher.get_output_embeddings()
        return _outputs(output_BTD, head)


def _outputs(output_BTD: Tensor, head: Any) -> Outputs:
    """Return what the logits of tokens 1 to T are made of."""
    # A sharded head is whole only now, after the forward pass.
    return Outputs(output_BTD[:, :-1].flatten(0, 1), None if head is None else head.weight)


@contextmanager
def loss_inside(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None = None,
    distillation: Distillation | None = None,
) -> Iterator[ModelLoss]:
    """Give a causal LM our loss function for as long as the context lasts.

    Args:
        model: the causal LM.
        teacher: a dense model in memory, which must allow slices too if slices are to be used.
        distillation: how much it counts.

    Raises:
        UnsupportedModelError: the class of one cannot run on text alone.
    """
    models = [model] if teacher is None else [model, teacher]
    for each in models:
        _check_runs_on_text(each)
    heads: list[Any] = [each.get_output_embeddings() for each in models]
    if not all(multiplies_only(each) for each in models):
        heads = []
    loss = ModelLoss(heads[0] if heads else None, teacher, distillation or Distillation())
    model.loss_function = loss
    for head in heads:
        head.forward = _pass
    try:
        yield loss
    finally:
        del model._loss_function
        for head in heads:
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
