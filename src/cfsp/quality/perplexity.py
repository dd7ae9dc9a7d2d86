"""Perplexity over windows of a text: of a model in memory, or of one that streams block by block.

Windows stand each on their own, and say how many tokens at the end of each are counted (see
`cfsp.text.windows`).

A model need not fit into memory: all windows pass block by block, and what leaves the last one goes
through the model's own norm and head, some positions at a time, so that the logits of a large
vocabulary take little memory. The dense model's predictions may be there to compare with: its last
hidden states wait, in memory or in a file, while other models stream, and the two heads are applied
to the same positions. Two models are never in memory as a whole.

Shapes: N windows, B windows in a batch, T tokens, P predictions, R some of them, D hidden,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import parameters_within
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.progress import item_progress
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock, part_of
from cfsp.streaming.decoder_end import Head, text_model
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.runtime import Runtime, check_is_number
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows

# Of a float32 log-softmax. Three times faster than without slices: they stay in the cache.
_LOSSES_AT_ONCE = 1 << 21
# Of two of them.
_PROBABILITIES_AT_ONCE = 1 << 20
# Enough positions for a fast product with the head, where the vocabulary is not huge.
LOGITS_AT_ONCE = 1 << 25

# What was added up over the predicted tokens of each window: `loss`, negative log-likelihood in
# nats; and beside a dense model `divergence`, KL(dense || model) in nats, and `agreed`, how many
# predictions have the dense model's most likely token (top-1 agreement).
WindowSums = dict[str, list[float]]


def mean_loss(loss: float, windows: Windows, label: str, dtype: torch.dtype) -> float:
    """Return a sum of losses in nats over windows per predicted token; NaN is an error."""
    check_is_number(loss, label, dtype)
    return loss / int(windows.scored_N.sum())


def perplexity_of(loss: float, windows: Windows, label: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the perplexity that a sum of losses amounts to, as JSON types, with its conditions.

    Only what has the same conditions compares: how many `tokens` were predicted, in how many
    `windows` of `seqlen` tokens, whether each begins with `bos`, whether nothing is calibrated or
    trained on that part of the text, the `evaluation_part`, which tokens they are, and the `dtype`.
    """
    return {
        "value": round(math.exp(min(mean_loss(loss, windows, label, dtype), 700.0)), 4),
        "tokens": int(windows.scored_N.sum()),
        "windows": len(windows.tokens_NT),
        "seqlen": windows.tokens_NT.shape[1],
        "bos": windows.bos,
        "evaluation_part": windows.evaluation_part,
        "tokens_digest": windows.digest,
        "dtype": str(dtype).removeprefix("torch."),
    }


def negative_log_likelihood(logits_PV: Tensor, next_P: Tensor) -> float:
    """Return the sum of -log p(next token) in nats, computed in float32, a few rows at a time."""
    rows = max(1, _LOSSES_AT_ONCE // logits_PV.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=logits_PV.device)
    for logits_RV, next_R in zip(
        torch.split(logits_PV, rows), torch.split(next_P, rows), strict=True
    ):
        total += cross_entropy(logits_RV.float(), next_R, reduction="sum")
    return float(total)


def divergence_and_agreement(logits_PV: Tensor, dense_PV: Tensor) -> tuple[float, int]:
    """Compare the predictions of a model with the dense model's, in float32.

    Returns the sum of KL(dense || model) over the positions in nats, and at how many of them the
    most likely token is the dense model's (top-1 agreement).
    """
    rows = max(1, _PROBABILITIES_AT_ONCE // logits_PV.shape[1])
    divergence = torch.zeros((), dtype=torch.float64, device=logits_PV.device)
    agreed = torch.zeros((), dtype=torch.int64, device=logits_PV.device)
    for logits_RV, dense_RV in zip(
        torch.split(logits_PV, rows), torch.split(dense_PV, rows), strict=True
    ):
        log_dense_RV = dense_RV.float().log_softmax(-1)
        probability_RV = log_dense_RV.exp()
        difference_RV = log_dense_RV - logits_RV.float().log_softmax(-1)
        # A token that the dense model rules out counts nothing, also if both rule it out.
        difference_RV.masked_fill_(probability_RV == 0, 0)
        divergence += torch.linalg.vecdot(probability_RV, difference_RV).sum(dtype=torch.float64)
        agreed += (logits_RV.argmax(-1) == dense_RV.argmax(-1)).sum()
    return float(divergence), int(agreed)


def loss_in_memory(model: PreTrainedModel, windows: Windows, label: str = "eval") -> float:
    """Return the loss in nats per token of a causal LM in evaluation mode, a window at a time.

    `streamed_sums` gives the same for any model. The windows have no padding.
    """
    check_tokens(model.config, windows.tokens_NT, label)
    scored_N = windows.scored_N.tolist()
    predictor = text_model(model)
    loss = 0.0
    with torch.inference_mode(), item_progress(label, len(scored_N), "window") as bar:
        for tokens_T, count in zip(windows.tokens_NT, scored_N, strict=True):
            tokens_T = tokens_T.to(model.device)
            output = predictor(input_ids=tokens_T[None], use_cache=False, logits_to_keep=count + 1)
            loss += negative_log_likelihood(output.logits[0, :-1], tokens_T[-count:])
            bar.update()
    return mean_loss(loss, windows, label, model.dtype)


class DenseEnd:
    """What the dense model predicts on the windows of a text, by what leaves its last block."""

    def __init__(self, source: WeightSource, runtime: Runtime, hidden: HiddenStates) -> None:
        self.head = Head(source, runtime.device, runtime.dtype)
        self._hidden, self._device = hidden, runtime.device

    def hidden_of(self, window: int) -> Tensor:
        """Return the hidden states of one window, TD."""
        batch = slice(window, window + 1)
        hidden_TD = self._hidden.read(batch)[0].clone().to(self._device)
        self._hidden.forget(batch)
        return hidden_TD


def before_and_after(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return text -> {"before", "after"} and the conditions of the latter, of perplexities as JSON.

    Of the latter: a sweep compares them with the dense model's, which may be older.
    """
    table: dict[str, dict[str, Any]] = {}
    for text, found in before.items():
        conditions = {name: value for name, value in after[text].items() if name != "value"}
        table[text] = {"before": found["value"], "after": after[text]["value"], **conditions}
    return table


def joined_sums(parts: Sequence[WindowSums]) -> WindowSums:
    """Return the sums of all windows, from those of parts of them in their order."""
    # Who has no windows has no sums.
    names = max(parts, key=len)
    return {name: list(chain.from_iterable(part.get(name, ()) for part in parts)) for name in names}


def streamed_sums(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    work_dir: WorkDir,
    label: str,
    *,
    dense: DenseEnd | None = None,
    on_end: Callable[[HiddenStates], None] | None = None,
) -> WindowSums:
    """Add up the loss of this process's windows, with two blocks of the model in memory at a time.

    The processes of the work directory share the windows; one that has none has no sums. Logits are
    in the dtype that the model computes in, their log-softmax is in float32. What pads windows at
    their end counts for nothing. `on_end` is given what left the last block; a pass that resumes a
    finished one has none.
    """
    own = windows.part(part_of(windows, work_dir.team, runtime.batch_windows))
    if not len(own.tokens_NT):
        return {}
    check_tokens(source.config, own.tokens_NT, label)
    name = f"perplexity-{sha256(label.encode()).hexdigest()[:8]}-{windows.digest[:8]}"
    visitor = _AtEnd(name, label, source, own, runtime, dense, on_end)
    found = pass_blocks(source, own, visitor, runtime, work_dir)[-1]
    assert found is not None
    return found


@dataclass(eq=False)
class _AtEnd(Visitor[WindowSums | None]):
    """Lets windows pass; gives what is measured of them when they leave the last block."""

    name: str
    label: str
    source: WeightSource
    windows: Windows
    runtime: Runtime
    dense: DenseEnd | None
    on_end: Callable[[HiddenStates], None] | None

    def __post_init__(self) -> None:
        # How many passes of a token through a block one through the head is worth.
        source, config = self.source, self.source.config
        of_blocks = parameters_within(source, f"{source.architecture.blocks}.")
        of_head = vocabulary_of(config) * text_config_of(config).hidden_size
        heads = 1 if self.dense is None else 2
        self._head_tokens = heads * of_head * source.architecture.block_count / of_blocks
        self.more_tokens = int(self._head_tokens * int(self.windows.scored_N.sum()))

    def visit(self, block: StreamedBlock) -> WindowSums | None:
        if block.index + 1 < self.source.architecture.block_count:
            block.advance()
            return None
        head = Head(self.source, self.runtime.device, self.runtime.dtype)
        names = ("loss",) if self.dense is None else ("loss", "divergence", "agreed")
        sums: WindowSums = {name: [] for name in names}

        def add(input_BTD: Tensor, output_BTD: Tensor) -> None:
            """Add what is measured of a batch; batches come in their order."""
            for hidden_TD in output_BTD:
                found = self._of_window(len(sums["loss"]), hidden_TD, head, block)
                for values, value in zip(sums.values(), found, strict=False):
                    values.append(value)

        block.advance(on_hidden=add)
        if self.on_end is not None:
            self.on_end(block.hidden)
        return sums

    def _of_window(
        self, window: int, hidden_TD: Tensor, head: Head, block: StreamedBlock
    ) -> tuple[float, float, int]:
        tokens_T = self.windows.tokens_NT[window].to(hidden_TD.device)
        padding_N, dense = self.windows.padding_N, self.dense
        end = len(tokens_T) - (0 if padding_N is None else int(padding_N[window]))
        start = end - int(self.windows.scored_N[window])
        dense_TD = None if dense is None else dense.hidden_of(window)
        loss, divergence, agreed = 0.0, 0.0, 0
        size = max(1, LOGITS_AT_ONCE // head.vocabulary)
        for first in range(start, end, size):
            last = min(first + size, end)
            predicting = slice(first - 1, last - 1)
            logits_PV = head.logits(hidden_TD[predicting])
            loss += negative_log_likelihood(logits_PV, tokens_T[first:last])
            if dense is not None and dense_TD is not None:
                dense_PV = dense.head.logits(dense_TD[predicting])
                found = divergence_and_agreement(logits_PV, dense_PV)
                divergence, agreed = divergence + found[0], agreed + found[1]
            block.tokens_done(int(self._head_tokens * (last - first)))
        return loss, divergence, agreed
