"""The language-model loss from hidden states, a slice of tokens at a time.

The head multiplies every hidden state by the whole vocabulary. For a small model that is a third
of all arithmetic, and logits of a batch in float32 are the largest tensor by far: 4 x 512 tokens
times 49,152 are 400 MB, and a plain backward pass holds several of them. The gradient of the loss
with respect to the logits is known in closed form, so it is taken at once, slice by slice, in the
forward pass: nothing of vocabulary size outlives its slice, and nothing is computed twice.

    cross-entropy           dL/dz = p - onehot(label)
    T^2 KL(teacher, model)  dL/dz = T (p_T - q_T)          p_T = softmax(z / T), q_T the teacher's

(Hinton, Vinyals and Dean, arXiv 1503.02531, give the second one and the factor T^2.)

Shapes: N predicted tokens, C tokens of a slice, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cfsp.recovery.settings import Distillation

IGNORED = -100
# Elements of one slice of logits: 24 MB in float32.
_SLICE_ELEMENTS = 6 << 20


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher's last hidden states; its logits are made slice by slice.

    Attributes:
        hidden_ND: after the last norm.
        head_VD: weight of the teacher's head.
    """

    hidden_ND: Tensor
    head_VD: Tensor

    def rows(self, rows: Tensor | slice) -> TeacherHidden:
        """Return the same for some tokens."""
        return TeacherHidden(self.hidden_ND[rows], self.head_VD)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's whole logits.

    Attributes:
        logit_NV: for every token.
    """

    logit_NV: Tensor

    def rows(self, rows: Tensor | slice) -> TeacherLogits:
        """Return the same for some tokens."""
        return TeacherLogits(self.logit_NV[rows])


Teacher = TeacherHidden | TeacherLogits


def language_model_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    label_N: Tensor,
    teacher: Teacher | None = None,
    distillation: Distillation | None = None,
) -> Tensor:
    """Return the loss summed over tokens; it is differentiable in the hidden states only.

    Args:
        hidden_ND: hidden states that predict, after the last norm.
        head_VD: weight of the head; it gets no gradient.
        label_N: token to predict, `IGNORED` where none counts.
        teacher: what to distil from, for the same tokens.
        distillation: how; needed with a teacher.
    """
    counted_N = label_N != IGNORED
    if not bool(counted_N.all()):
        hidden_ND, label_N = hidden_ND[counted_N], label_N[counted_N]
        teacher = teacher.rows(counted_N) if teacher is not None else None
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    apply: Any = _SlicedLoss.apply
    loss: Tensor = apply(hidden_ND, head_VD, label_N, teacher, distillation)
    return loss


def whole_logits_loss(
    logit_NV: Tensor,
    label_N: Tensor,
    teacher: Teacher | None,
    distillation: Distillation | None,
) -> Tensor:
    """Return the same loss from logits, in one piece and differentiable by autograd.

    Args:
        logit_NV: the model's logits.
        label_N: as for `language_model_loss`.
        teacher: what to distil from; not hidden states.
        distillation: how; needed with a teacher.
    """
    counted_N = label_N != IGNORED
    logit_NV, label_N = logit_NV[counted_N].float(), label_N[counted_N]
    labels = cross_entropy(logit_NV, label_N, reduction="sum")
    if teacher is None:
        return labels
    assert distillation is not None
    teacher = teacher.rows(counted_N)
    temperature = distillation.temperature
    own_NV = log_softmax(logit_NV / temperature, 1)
    assert isinstance(teacher, TeacherLogits)
    target_NV = log_softmax(teacher.logit_NV.float() / temperature, 1)
    divergence = kl_div(own_NV, target_NV, reduction="sum", log_target=True)
    weight = distillation.weight
    return weight * temperature**2 * divergence + (1 - weight) * labels


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        label_N: Tensor,
        teacher: Teacher | None,
        distillation: Distillation | None,
    ) -> Tensor:
        # Autocast would cast the head once for each slice.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head_VD = head_VD.to(hidden_ND.dtype)
            gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
            total = hidden_ND.new_zeros((), dtype=torch.float32)
            size = max(1, _SLICE_ELEMENTS // head_VD.shape[0])
            slices = _SliceMemory(min(size, len(hidden_ND)), head_VD)
            for start in range(0, len(hidden_ND), size):
                rows = slice(start, start + size)
                logit_CV = slices.logits(hidden_ND[rows])
                part = teacher.rows(rows) if teacher is not None else None
                loss, slope_CV = _loss_and_slope(
                    logit_CV, label_N[rows], part, distillation, slices
                )
                total += loss
                if gradient_ND is not None:
                    torch.mm(slices.narrow(slope_CV), head_VD, out=gradient_ND[rows])
        ctx.gradient_ND = gradient_ND
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND = ctx.gradient_ND
        return (gradient_ND * slopes[0].to(gradient_ND.dtype), None, None, None, None)


class _SliceMemory:
    """Memory for slices of vocabulary size, taken once: fresh pages cost more than arithmetic."""

    def __init__(self, size: int, head_VD: Tensor) -> None:
        shape = (size, head_VD.shape[0])
        self._head_VD = head_VD
        self._narrow_CV = head_VD.new_empty(shape)
        self._wide: dict[str, Tensor] = {}
        self._shape = shape

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the model's logits in float32."""
        return self._multiply(hidden_CD, self._head_VD, "model")

    def teacher_logits(self, hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
        """Return the teacher's logits in float32."""
        return self._multiply(hidden_CD, head_VD.to(hidden_CD.dtype), "teacher")

    def wide(self, name: str, rows: int) -> Tensor:
        """Return float32 memory for one slice; the same name is the same memory."""
        if name not in self._wide:
            self._wide[name] = self._narrow_CV.new_empty(self._shape, dtype=torch.float32)
        return self._wide[name][:rows]

    def narrow(self, value_CV: Tensor) -> Tensor:
        """Return a slice in the dtype of the hidden states."""
        return self._narrow_CV[: len(value_CV)].copy_(value_CV)

    def _multiply(self, hidden_CD: Tensor, head_VD: Tensor, name: str) -> Tensor:
        rows = len(hidden_CD)
        if hidden_CD.dtype == self._narrow_CV.dtype:
            logit_CV = torch.mm(hidden_CD, head_VD.T, out=self._narrow_CV[:rows])
        else:
            logit_CV = hidden_CD @ head_VD.T
        return self.wide(name, rows).copy_(logit_CV)


def _loss_and_slope(
    logit_CV: Tensor,
    label_C: Tensor,
    teacher: Teacher | None,
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
    logit_CV: Tensor, teacher: Teacher, temperature: float, memory: _SliceMemory
) -> tuple[Tensor, Tensor]:
    spare_CV = memory.wide("spare", len(logit_CV))
    log_prob_CV = _log_softmax_(_cool_(logit_CV, temperature), spare_CV)
    assert isinstance(teacher, TeacherHidden)
    target_CV = memory.teacher_logits(teacher.hidden_ND, teacher.head_VD)
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
