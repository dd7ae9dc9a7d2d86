"""What a block is judged by between two streams, and how their windows are split."""

import numpy as np
import pytest
import torch

from cfsp.processes import Team
from cfsp.repair.two_streams import Split, hidden_loss, token_error
from cfsp.text.windows import Windows


def test_losses_are_relative_to_each_token_and_to_all_together():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 500, 8, generator=generator)
    target[:, 0] *= 1000  # as the first tokens of a window often are
    output = target + 0.1 * torch.randn(2, 500, 8, generator=generator)
    t, o = target.double().numpy(), output.double().numpy()
    each = np.mean(np.linalg.norm(o - t, axis=-1) / np.linalg.norm(t, axis=-1))
    expected = each + np.linalg.norm(o - t) / np.linalg.norm(t)
    before = float(hidden_loss(output, target))
    assert float(token_error(output, target)) == pytest.approx(each, rel=1e-5)
    assert before == pytest.approx(expected, rel=1e-5)
    # The one that all others attend to is lost: a thousandth of the tokens.
    output[:, 0] *= 0.5
    assert float(token_error(output, target)) < 1.02 * each
    assert float(hidden_loss(output, target)) > 3 * before
    assert float(hidden_loss(target, target)) == 0


@pytest.mark.parametrize(("windows", "batch"), [(2, 2), (9, 2), (65, 8)])
def test_every_window_is_fitted_to_or_held_out(windows, batch):
    tokens_NT = torch.zeros(windows, 16, dtype=torch.int64)
    text = Windows(tokens_NT, {"one": windows // 2, "two": -(-windows // 2)})
    split = Split(text, batch, Team())
    assert 0 < len(split.held_out) < windows
    if windows >= 4:  # some of both texts
        assert min(split.held_out) < windows // 2 <= max(split.held_out)
    assert [i for batch in split.judged for i in batch] == split.held_out
    assert [i for batch in split.batches for i in batch] == list(range(windows))
    assert {len(batch) for batch in (*split.judged, *split.batches)} == split.batch_sizes
