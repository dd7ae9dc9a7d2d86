"""The language-model loss from hidden states, a slice of tokens at a time.

The head multiplies every hidden state by the whole vocabulary. For a small model that is a third
of all arithmetic, and logits of a batch in float32 are the largest tensor by far: 4 x 512 tokens
times 49,152 are 400 MB, and a plain backward pass holds several of them. The gradient of the loss
with respect to the logits is known in closed form, so it is taken at once, slice by slice, in the
forward pass: nothing of vocabulary size outlives its slice, and nothing is computed twice.

    cross-entropy           dL/dz = p - onehot(label)
    T^2 KL(teacher, model)  dL/dz = T (p_T - q_T)          p_T = softmax(z / T), q_T the teacher's

(Hinton, Vinyals and Dean, arXiv 1503.02531, give the second one and the factor T^2.)

It is computed inside the model's forward, through transformers' own hook for that, so that gradient
accumulation, DDP and FSDP work as for any model. Where logits are the head's product and nothing
more, the head is made to let the hidden states pass. A model that caps, scales or shifts its logits
keeps its head and pays for whole ones, which are cut into slices.

Shapes: B windows, T tokens, N predicted tokens, C tokens of a slice, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.discovery import find_architecture
from cfsp.errors import UnsupportedModelError
from cfsp.recovery.settings import Distillation
from cfsp.streaming.decoder_end import text_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
# Elements of one slice of logits: 24 MB in float32.
_SLICE_ELEMENTS = 6 << 20


@dataclass(frozen=True)
class Outputs:
    """Last hidden states and the weight of the head that makes logits of them, or logits."""

    output_ND: Tensor
    head_VD: Tensor | None = None

    def rows(self, rows: Tensor | slice) -> Outputs:
        """Return the same for some tokens."""
        return Outputs(self.output_ND[rows], self.head_VD)


def language_model_loss(
    own: Outputs,
    label_N: Tensor,
    teacher: Outputs | None = None,
    distillation: Distillation | None = None,
) -> Tensor:
    """Return the loss summed over tokens with a label; heads and the teacher get no gradient."""
    counted_N = label_N != IGNORED
    if not bool(counted_N.all()):
        own, label_N = own.rows(counted_N), label_N[counted_N]
        teacher = teacher.rows(counted_N) if teacher is not None else None
    output_ND, device = own.output_ND, own.output_ND.device.type
    if own.head_VD is not None and torch.is_autocast_enabled(device):
        output_ND = output_ND.to(torch.get_autocast_dtype(device))
    apply: Any = _SlicedLoss.apply
    loss: Tensor = apply(output_ND, own.head_VD, label_N, teacher, distillation)
    return loss


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output_ND: Tensor,
        head_VD: Tensor | None,
        label_N: Tensor,
        teacher: Outputs | None,
        distillation: Distillation | None,
    ) -> Tensor:
        # Autocast would cast the head once for each slice.
        with torch.autocast(output_ND.device.type, enabled=False):
            head_VD = None if head_VD is None else head_VD.to(output_ND.dtype)
            own = Outputs(output_ND, head_VD)
            gradient_ND = torch.empty_like(output_ND) if ctx.needs_input_grad[0] else None
            total = output_ND.new_zeros((), dtype=torch.float32)
            vocabulary = output_ND.shape[1] if head_VD is None else head_VD.shape[0]
            size = max(1, _SLICE_ELEMENTS // vocabulary)
            memory = _SliceMemory(output_ND.new_empty((min(size, len(label_N)), vocabulary)))
            for start in range(0, len(label_N), size):
                rows = slice(start, start + size)
                logit_CV = memory.logits("model", own.rows(rows))
                part = teacher.rows(rows) if teacher is not None else None
                loss, slope_CV = _loss_and_slope(
                    logit_CV, label_N[rows], part, distillation, memory
                )
                total += loss
                if gradient_ND is None:
                    continue
                if head_VD is None:
                    gradient_ND[rows] = slope_CV
                else:
                    torch.mm(memory.narrow(slope_CV), head_VD, out=gradient_ND[rows])
        ctx.gradient_ND = gradient_ND
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND = ctx.gradient_ND
        return (gradient_ND * slopes[0].to(gradient_ND.dtype), None, None, None, None)


class _SliceMemory:
    """Memory for slices of vocabulary size, taken once: fresh pages cost more than arithmetic."""

    def __init__(self, narrow_CV: Tensor) -> None:
        self._narrow_CV = narrow_CV
        self._wide: dict[str, Tensor] = {}

    def logits(self, name: str, made_of: Outputs) -> Tensor:
        """Return logits in float32, in the memory of a name."""
        output_CD, head_VD = made_of.output_ND, made_of.head_VD
        if head_VD is None:
            logit_CV = output_CD
        elif output_CD.dtype == self._narrow_CV.dtype:
            out_CV = self._narrow_CV[: len(output_CD)]
            logit_CV = torch.mm(output_CD, head_VD.to(output_CD.dtype).T, out=out_CV)
        else:
            logit_CV = output_CD @ head_VD.to(output_CD.dtype).T
        return self.wide(name, len(output_CD)).copy_(logit_CV)

    def wide(self, name: str, rows: int) -> Tensor:
        """Return float32 memory for one slice; the same name is the same memory."""
        if name not in self._wide:
            self._wide[name] = torch.empty_like(self._narrow_CV, dtype=torch.float32)
        return self._wide[name][:rows]

    def narrow(self, value_CV: Tensor) -> Tensor:
        """Return a slice in the dtype of the hidden states."""
        return self._narrow_CV[: len(value_CV)].copy_(value_CV)


def _loss_and_slope(
    logit_CV: Tensor,
    label_C: Tensor,
    teacher: Outputs | None,
    distillation: Distillation | None,
    memory: _SliceMemory,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a slice and its derivative by the logits, which are overwritten."""
    if teacher is None:
        return _cross_entropy(logit_CV, label_C)
    assert distillation is not None
    weight = distillation.weight
    if weight == 1.0:
        return _divergence(logit_CV, teacher, distillation.temperature, memory)
    copy_CV = memory.wide("copy", len(logit_CV)).copy_(logit_CV)
    teacher_loss, teacher_slope_CV = _divergence(copy_CV, teacher, distillation.temperature, memory)
    label_loss, slope_CV = _cross_entropy(logit_CV, label_C)
    loss = weight * teacher_loss + (1 - weight) * label_loss
    return loss, slope_CV.mul_(1 - weight).add_(teacher_slope_CV, alpha=weight)


def _cross_entropy(logit_CV: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    chosen_C1 = logit_CV.gather(1, label_C[:, None])
    largest_C1 = logit_CV.amax(1, keepdim=True)
    slope_CV = logit_CV.sub_(largest_C1).exp_()
    sum_C1 = slope_CV.sum(1, keepdim=True)
    loss = (sum_C1.log() + largest_C1 - chosen_C1).sum()
    slope_CV = slope_CV.div_(sum_C1)
    slope_CV.scatter_add_(1, label_C[:, None], slope_CV.new_full((len(label_C), 1), -1.0))
    return loss, slope_CV


def _divergence(
    logit_CV: Tensor, teacher: Outputs, temperature: float, memory: _SliceMemory
) -> tuple[Tensor, Tensor]:
    spare_CV = memory.wide("spare", len(logit_CV))
    log_prob_CV = _log_softmax_(_cool_(logit_CV, temperature), spare_CV)
    target_CV = memory.logits("teacher", teacher)
    target_CV = _log_softmax_(_cool_(target_CV, temperature), spare_CV)
    torch.sub(target_CV, log_prob_CV, out=spare_CV)
    target_CV = target_CV.exp_()
    loss = torch.dot(target_CV.view(-1), spare_CV.view(-1))
    slope_CV = log_prob_CV.exp_().sub_(target_CV)
    return loss * temperature**2, _cool_(slope_CV, 1 / temperature)


def _cool_(value_CV: Tensor, temperature: float) -> Tensor:
    return value_CV if temperature == 1.0 else value_CV.div_(temperature)


def _log_softmax_(logit_CV: Tensor, spare_CV: Tensor) -> Tensor:
    """Return the log-softmax in the memory of the logits."""
    logit_CV = logit_CV.sub_(logit_CV.amax(1, keepdim=True))
    sum_C1 = torch.exp(logit_CV, out=spare_CV).sum(1, keepdim=True)
    return logit_CV.sub_(sum_C1.log_())


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
        """Return the mean loss over labels, as transformers asks for it.

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
    """Give a causal LM our loss function for as long as the context lasts."""
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
    """Check that a multimodal model runs on text alone, as Llama 4 of 5.24 does not."""
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
