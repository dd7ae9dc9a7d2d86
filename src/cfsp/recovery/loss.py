"""The language-model loss from hidden states, a slice of tokens at a time.

The head multiplies every hidden state by the whole vocabulary. For a small model that is a third
of all arithmetic, and logits of a batch in float32 are the largest tensor by far: 4 x 512 tokens
times 49,152 are 400 MB, and a plain backward pass holds several of them. The gradient of the loss
with respect to the logits is known in closed form, so it is taken at once, slice by slice, in the
forward pass: nothing of vocabulary size outlives its slice, and nothing is computed twice.

    cross-entropy         dL/dz = p - onehot(label)    p = softmax(z)
    KL(teacher || model)  dL/dz = p - q                q of the teacher

It is computed inside the model's forward, through transformers' own hook for that, so that DDP
and FSDP work as for any model. Where logits are the head's product and nothing
more, the head is made to let the hidden states pass. A model that caps, scales or shifts its logits
keeps its head and pays for whole ones, which are cut into slices.

Shapes: B windows, T tokens, N predicted tokens, C tokens of a slice, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp.architecture.discovery import find_architecture
from cfsp.errors import RecoveryError, UnsupportedModelError

IGNORED = -100
# Elements of one slice of logits: 24 MB in float32. With fewer rows than these the head of a large
# vocabulary would be read more often than it is worth: 96 take 0.7 times the time of 41.
_SLICE_ELEMENTS = 6 << 20
_LEAST_ROWS = 96


@dataclass(frozen=True)
class Outputs:
    """Last hidden states and the weight of the head that makes logits of them, or logits."""

    output_ND: Tensor
    head_VD: Tensor | None = None

    def rows(self, rows: Tensor | slice) -> Outputs:
        """Return the same for some tokens."""
        return Outputs(self.output_ND[rows], self.head_VD)


def language_model_loss(
    own: Outputs, label_N: Tensor, teacher: Outputs | None = None, weight: float = 0.0
) -> Tensor:
    """Return the loss summed over tokens with a label; heads and the teacher get no gradient.

    A teacher counts by its weight, labels by the rest.
    """
    counted_N = label_N != IGNORED
    if not bool(counted_N.all()):
        own, label_N = own.rows(counted_N), label_N[counted_N]
        teacher = teacher.rows(counted_N) if teacher is not None else None
    output_ND, device = own.output_ND, own.output_ND.device.type
    if own.head_VD is not None and torch.is_autocast_enabled(device):
        output_ND = output_ND.to(torch.get_autocast_dtype(device))
    apply: Any = _SlicedLoss.apply
    loss: Tensor = apply(output_ND, own.head_VD, label_N, teacher, weight)
    return loss


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output_ND: Tensor,
        head_VD: Tensor | None,
        label_N: Tensor,
        teacher: Outputs | None,
        weight: float,
    ) -> Tensor:
        # Autocast would cast the head once for each slice.
        with torch.autocast(output_ND.device.type, enabled=False):
            head_VD = None if head_VD is None else head_VD.to(output_ND.dtype)
            own = Outputs(output_ND, head_VD)
            gradient_ND = torch.empty_like(output_ND) if ctx.needs_input_grad[0] else None
            total = output_ND.new_zeros((), dtype=torch.float32)
            vocabulary = output_ND.shape[1] if head_VD is None else head_VD.shape[0]
            size = max(_LEAST_ROWS, _SLICE_ELEMENTS // vocabulary)
            # Memory of slices is taken once: fresh pages cost more than arithmetic.
            shape = min(size, len(label_N)), vocabulary
            wide = [
                output_ND.new_empty(shape, dtype=torch.float32)
                for _ in range(1 if teacher is None else 3)
            ]
            for start in range(0, len(label_N), size):
                rows = slice(start, start + size)
                label_C1 = label_N[rows, None]
                slices = [each_CV[: len(label_C1)] for each_CV in wide]
                _write_logits(own.rows(rows), slices[0])
                if teacher is not None:
                    _write_logits(teacher.rows(rows), slices[1])
                loss, slope_CV = _loss_and_slope(slices, label_C1, weight)
                total += loss
                if gradient_ND is not None and head_VD is None:
                    gradient_ND[rows] = slope_CV
                elif gradient_ND is not None and head_VD is not None:
                    torch.mm(slope_CV.to(head_VD.dtype), head_VD, out=gradient_ND[rows])
        ctx.gradient_ND = gradient_ND
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND = ctx.gradient_ND
        return (gradient_ND * slopes[0].to(gradient_ND.dtype), None, None, None, None)


def _write_logits(made_of: Outputs, logit_CV: Tensor) -> None:
    """Write float32 logits of a slice."""
    output_CD, head_VD = made_of.output_ND, made_of.head_VD
    if head_VD is None:
        logit_CV.copy_(output_CD)
    elif output_CD.dtype == logit_CV.dtype:
        torch.mm(output_CD, head_VD.to(output_CD.dtype).T, out=logit_CV)
    else:
        logit_CV.copy_(output_CD @ head_VD.to(output_CD.dtype).T)


def _loss_and_slope(slices: list[Tensor], label_C1: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a slice and its derivative by the logits.

    `slices` are memory: logits, and with a teacher its logits and as much again.
    """
    logit_CV, *rest = slices
    chosen_C1 = logit_CV.gather(1, label_C1)
    largest_C1 = logit_CV.amax(1, keepdim=True)
    logit_CV.sub_(largest_C1)
    divergence = logit_CV.new_zeros(())
    if rest:
        target_CV, spare_CV = rest
        target_CV.sub_(target_CV.amax(1, keepdim=True))
        target_CV.sub_(torch.exp(target_CV, out=spare_CV).sum(1, keepdim=True).log_())
        # Up to the logarithm of the sum of the model's own exponentials.
        torch.sub(target_CV, logit_CV, out=spare_CV)
        divergence = torch.dot(target_CV.exp_().view(-1), spare_CV.view(-1))
    slope_CV = logit_CV.exp_()
    sum_C1 = slope_CV.sum(1, keepdim=True)
    log_sum_C1 = sum_C1.log()
    loss = (log_sum_C1 + largest_C1 - chosen_C1).sum()
    slope_CV = slope_CV.div_(sum_C1)
    if rest:
        loss = weight * (divergence + log_sum_C1.sum()) + (1 - weight) * loss
        slope_CV.sub_(target_CV, alpha=weight)
    else:
        weight = 0.0
    slope_CV.scatter_add_(1, label_C1, torch.full_like(chosen_C1, weight - 1))
    return loss, slope_CV


class ModelLoss:
    """A loss function for a causal LM, in which a teacher with a head of the same kind may count.

    The head, an output embedding, lets hidden states pass; it is None where logits come whole.
    """

    def __init__(
        self, head: nn.Module | None, teacher: PreTrainedModel | None, weight: float
    ) -> None:
        # What to distil from in the next call; None for the labels alone.
        self.taught: Outputs | None = None
        # What a window counts as having in the next call; None for what it has.
        self.labels_in_window: float | None = None
        self._head = head
        self._teacher: Any = teacher
        # What the teacher's head multiplies, of windows that are asked about again and again: from
        # earlier evaluations, and from the one that goes on.
        self._known: dict[bytes, Tensor] = {}
        self._fresh: dict[bytes, Tensor] = {}
        self._weight = weight

    @property
    def teacher_thinks_once(self) -> bool:
        """Whether what a teacher thinks is kept; logits of the whole vocabulary are too large."""
        return self._teacher is not None and self._head is not None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean loss over labels [B, T], as transformers asks for it.

        `logits` are what the model's head returned, [B, T, D or V]; `num_items_in_batch` counts the
        labels of the whole step, None those of this batch.
        """
        label_N = labels[:, 1:].flatten()
        own = _outputs(logits, self._head)
        loss = language_model_loss(own, label_N, self.taught, self._weight)
        count: Tensor | float | None = num_items_in_batch
        if self.labels_in_window is not None:
            count = len(labels) * self.labels_in_window
        elif count is None:
            count = (label_N >= 0).sum().clamp_min(1)
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def ask(self, token_BT: Tensor, *, again: bool = False) -> Outputs | None:
        """Return what the teacher thinks of tokens 1 to T; None without one.

        It thinks once of windows that are asked about `again` and again, as held-out ones are: in
        the first evaluation of all. Where it is sharded, no process may think alone, and some may
        have the same windows twice. What it thought waits in the memory of the CPU.
        """
        if self._teacher is None:
            return None
        again &= self.teacher_thinks_once
        if not again:  # a step: the evaluation before it is over
            self._known |= self._fresh
            self._fresh.clear()
        name = token_BT.cpu().numpy().tobytes() if again else b""
        if name in self._known:
            output_BTD = self._known[name].to(token_BT.device)
        else:
            with torch.no_grad():
                output_BTD = self._teacher(input_ids=token_BT, use_cache=False).logits
            if again:
                self._fresh[name] = output_BTD.cpu()
        head = None if self._head is None else self._teacher.get_output_embeddings()
        return _outputs(output_BTD, head)


def _outputs(output_BTD: Tensor, head: Any) -> Outputs:
    """Return what the logits of tokens 1 to T are made of."""
    # A sharded head is whole only now, after the forward pass.
    return Outputs(output_BTD[:, :-1].flatten(0, 1), None if head is None else head.weight)


def diverged(step: int, what: str, *, in_bfloat16: bool) -> RecoveryError:
    """Return the error of a loss that is not finite."""
    return RecoveryError(
        f"{what} is NaN or infinite at step {step}; start again with a lower --learning-rate"
        + (", or in --dtype float32" if in_bfloat16 else "")
    )


@contextmanager
def loss_inside(
    model: PreTrainedModel, teacher: PreTrainedModel | None = None, weight: float = 0.0
) -> Iterator[ModelLoss]:
    """Give a causal LM our loss function for as long as the context lasts."""
    models = [model] if teacher is None else [model, teacher]
    heads: list[Any] = [each.get_output_embeddings() for each in models]
    multiply = [multiplies_only(each) for each in models]  # each is asked: one may be refused
    if not all(multiply):
        heads = []
    loss = ModelLoss(heads[0] if heads else None, teacher, weight)
    model.loss_function = loss
    for head in heads:
        head.forward = _pass
    try:
        yield loss
    finally:
        del model._loss_function
        for head in heads:
            del head.forward


def multiplies_only(model: Any) -> bool:
    """Return whether a model's logits are its last hidden states times its head's weight.

    It is asked, with two tokens, rather than known by its name. A multimodal model that does not
    run on text alone, as Llama 4 of transformers 5.24, is refused.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if base is model:  # where the prefix of its names is that of a multimodal model around it
        base = model.get_submodule(find_architecture(model).decoder)
    if model.training:
        return False
    token_BT = torch.tensor([[0, 1]], device=model.device)
    # Trained tensors are float32 between others in bfloat16, as in training itself.
    mixed = torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16)
    head.forward = _pass
    try:
        with torch.no_grad(), mixed:
            passed_BTD = model(input_ids=token_BT, use_cache=False).logits
            hidden_BTD = base(input_ids=token_BT, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be trained on text: its own forward fails in "
            f"transformers {transformers.__version__} ({type(error).__name__}: {error})"
        ) from error
    finally:
        del head.forward
    return getattr(head, "bias", None) is None and torch.equal(passed_BTD, hidden_BTD)


def _pass(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD
