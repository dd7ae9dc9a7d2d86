"""The sliced loss against what autograd makes of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from cfsp.recovery import loss as module
from cfsp.recovery.loss import IGNORED, Outputs, language_model_loss

N, D, V = 11, 8, 37


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four tokens a slice: the last slice is not full.
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 4 * V)


def inputs(seed: int = 0) -> tuple[Outputs, Tensor, Outputs]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, requires_grad=True)
    head_VD = torch.randn(V, D, generator=generator)
    label_N = torch.randint(V, (N,), generator=generator)
    label_N[[2, 7]] = IGNORED
    teacher_ND = torch.randn(N, D + 1, generator=generator)
    teacher_VD = torch.randn(V, D + 1, generator=generator)
    return Outputs(hidden_ND, head_VD), label_N, Outputs(teacher_ND, teacher_VD)


def whole(outputs: Outputs) -> Outputs:
    """Return the same as logits."""
    assert outputs.head_VD is not None
    return Outputs(outputs.output_ND @ outputs.head_VD.T)


def plain_loss(own: Outputs, label_N: Tensor, teacher: Outputs, weight: float | None) -> Tensor:
    keep_N = label_N != IGNORED
    logit_NV, teacher_NV = (whole(each).output_ND[keep_N] for each in (own, teacher))
    labels = cross_entropy(logit_NV, label_N[keep_N], reduction="sum")
    if weight is None:
        return labels
    mine, target = (log_softmax(each, 1) for each in (logit_NV, teacher_NV))
    divergence = (target.exp() * (target - mine)).sum()
    return weight * divergence + (1 - weight) * labels


def gradient(loss: Tensor, own: Outputs) -> Tensor:
    (found,) = torch.autograd.grad(3.0 * loss, own.output_ND, retain_graph=True)
    return found


@pytest.mark.parametrize("weight", [None, 1.0, 0.3])
def test_loss_and_gradient_by_slices_and_by_whole_logits(weight):
    own, label_N, teacher = inputs()
    plain = plain_loss(own, label_N, teacher, weight)
    for made in (lambda outputs: outputs, whole):
        taught = (made(teacher), weight) if weight else ()
        ours = language_model_loss(made(own), label_N, *taught)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(gradient(ours, own), gradient(plain, own))


def test_bfloat16_autocast_stays_near_float32():
    own, label_N, _ = inputs()
    plain = language_model_loss(own, label_N)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = language_model_loss(own, label_N)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.02, atol=0.02)
    found = gradient(rounded, own)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient(plain, own), rtol=0.1, atol=0.1)


def test_without_gradient_and_without_labels():
    own, label_N, _ = inputs()
    with torch.no_grad():
        quiet = language_model_loss(own, label_N)
    torch.testing.assert_close(quiet, language_model_loss(own, label_N).detach())
    nothing = language_model_loss(own, torch.full_like(label_N, IGNORED))
    assert nothing.item() == 0
    assert float(gradient(nothing, own).abs().max()) == 0
