"""The sliced loss against what autograd makes of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from cfsp.recovery import loss as module
from cfsp.recovery.loss import (
    IGNORED,
    TeacherHidden,
    TeacherLogits,
    language_model_loss,
    whole_logits_loss,
)
from cfsp.recovery.settings import Distillation

N, D, V = 11, 8, 37


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four tokens a slice: the last slice is not full.
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 4 * V)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TeacherHidden]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, requires_grad=True)
    head_VD = torch.randn(V, D, generator=generator)
    label_N = torch.randint(V, (N,), generator=generator)
    label_N[[2, 7]] = IGNORED
    teacher_ND = torch.randn(N, D + 1, generator=generator)
    teacher_VD = torch.randn(V, D + 1, generator=generator)
    return hidden_ND, head_VD, label_N, TeacherHidden(teacher_ND, teacher_VD)


def plain_loss(
    logit_NV: Tensor, label_N: Tensor, teacher_NV: Tensor | None, how: Distillation | None
) -> Tensor:
    keep_N = label_N != IGNORED
    labels = cross_entropy(logit_NV[keep_N], label_N[keep_N], reduction="sum")
    if teacher_NV is None or how is None:
        return labels
    own = log_softmax(logit_NV[keep_N] / how.temperature, 1)
    target = log_softmax(teacher_NV[keep_N] / how.temperature, 1)
    divergence = (target.exp() * (target - own)).sum() * how.temperature**2
    return how.weight * divergence + (1 - how.weight) * labels


def gradient(loss: Tensor, hidden_ND: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(3.0 * loss, hidden_ND)
    return found


def test_cross_entropy_and_its_gradient():
    hidden_ND, head_VD, label_N, _ = inputs()
    ours = language_model_loss(hidden_ND, head_VD, label_N)
    plain = plain_loss(hidden_ND @ head_VD.T, label_N, None, None)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient(ours, hidden_ND), gradient(plain, hidden_ND))


@pytest.mark.parametrize("how", [Distillation(1.0, 1.0), Distillation(0.3, 2.5)])
def test_distillation_and_its_gradient(how):
    hidden_ND, head_VD, label_N, teacher = inputs()
    ours = language_model_loss(hidden_ND, head_VD, label_N, teacher, how)
    teacher_NV = teacher.hidden_ND @ teacher.head_VD.T
    plain = plain_loss(hidden_ND @ head_VD.T, label_N, teacher_NV, how)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient(ours, hidden_ND), gradient(plain, hidden_ND))


def test_bfloat16_autocast_stays_near_float32():
    hidden_ND, head_VD, label_N, _ = inputs()
    plain = language_model_loss(hidden_ND, head_VD, label_N)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = language_model_loss(hidden_ND, head_VD, label_N)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.02, atol=0.02)
    found = gradient(rounded, hidden_ND)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient(plain, hidden_ND), rtol=0.1, atol=0.1)


def test_without_gradient_and_without_labels():
    hidden_ND, head_VD, label_N, _ = inputs()
    with torch.no_grad():
        quiet = language_model_loss(hidden_ND, head_VD, label_N)
    torch.testing.assert_close(quiet, language_model_loss(hidden_ND, head_VD, label_N).detach())
    nothing = language_model_loss(hidden_ND, head_VD, torch.full_like(label_N, IGNORED))
    assert nothing.item() == 0
    assert float(gradient(nothing, hidden_ND).abs().max()) == 0


@pytest.mark.parametrize("kind", ["none", "whole"])
def test_whole_logits_give_the_same_loss_and_gradient(kind):
    hidden_ND, head_VD, label_N, teacher = inputs()
    teacher_NV = teacher.hidden_ND @ teacher.head_VD.T
    how = Distillation(0.4, 1.5)
    for_slices, for_whole = {
        "none": (None, None),
        "whole": (teacher, TeacherLogits(teacher_NV)),
    }[kind]
    sliced = language_model_loss(hidden_ND, head_VD, label_N, for_slices, how)
    whole = whole_logits_loss(hidden_ND @ head_VD.T, label_N, for_whole, how)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(gradient(sliced, hidden_ND), gradient(whole, hidden_ND))
