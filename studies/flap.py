"""Study 8: what does FLAP, the method nearest to ours, leave of the model?

    python studies/run.py 8 --texts DIR

FLAP (An et al., arXiv 2312.11983) for the FFN alone. A channel's score is its variance over tokens
times the squared norm of its column of the down projection: what is lost when the channel is held
at its mean. Scores are standardised in every block, one threshold over all blocks decides which
channels stay, widths are rounded as ours are, and the down projections get a bias that adds what
the pruned channels added on average. (The published code updates its running mean before it takes
the deviation from the old one; here variances come from sums over all tokens.) Prints Markdown.

Shapes: D hidden, F FFN channels, P pruned ones, L blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.planning.allocation import channels_to_keep, round_widths
from cfsp.planning.fine import read_ffn_weights, strongest_channels
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.planning.widths import model_size
from cfsp.settings import Budget
from conditions import parser_of_model
from results import table
from study import Study
from subject import MULTIPLE, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(arguments)
    study = Study(args)
    rows = [
        study.results.measure({"method": "flap", "sparsity": sparsity}, _pruned, study, sparsity)
        for sparsity in args.sparsity
    ]
    print(f"\n{table(rows, ['method', 'sparsity'], study.texts)}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_model("flap", __doc__.splitlines()[0])
    found.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.5])
    return found


def _pruned(study: Study, sparsity: float) -> dict[str, float]:
    subject, statistics = study.subject, study.statistics
    plan = plan_of(subject, statistics, Budget(sparsity, multiple=MULTIPLE))
    return subject.quality(with_biases(subject, statistics, plan))


def plan_of(subject: Subject, statistics: Statistics, budget: Budget) -> PruningPlan:
    """Return the channels that one threshold over the standardised scores of all blocks keeps."""
    size = model_size(subject.source)
    total = channels_to_keep(budget, size)
    score_F_of_L = [_scores(subject, statistics, block) for block in range(len(size.units))]
    threshold = torch.cat(score_F_of_L).sort(descending=True).values[round(total) - 1]
    earned_L = [float((score_F >= threshold).sum()) for score_F in score_F_of_L]
    multiple_L = size.multiple_U(budget)
    kept_L = round_widths(earned_L, size.width_U, size.cost_U, multiple_L, total)
    units = (
        # A plan's importance is positive, also where no channel is above the threshold.
        UnitPlan(
            block, width, tuple(strongest_channels(score_F, kept)), 0.0, max(earned, 1.0) / width
        )
        for block, (width, score_F, kept, earned) in enumerate(
            zip(size.width_U, score_F_of_L, kept_L, earned_L, strict=True)
        )
    )
    return PruningPlan(ModelIdentity.of(subject.source), {}, {}, tuple(units))


def _scores(subject: Subject, statistics: Statistics, block: int) -> Tensor:
    """Return a block's scores with mean 0 and standard deviation 1, float64 [F]."""
    down_DF = read_ffn_weights(subject.source, block).down_DF.double()
    score_F = statistics.units[block].variance_F * down_DF.square().sum(0)
    return (score_F - score_F.mean()) / score_F.std(correction=0)


def with_biases(subject: Subject, statistics: Statistics, plan: PruningPlan) -> PreTrainedModel:
    """Return the pruned model whose down projections add the means of what is gone.

    b' = b + W_P E[x_P]
    """
    pruned, architecture = subject.pruned(plan), subject.source.architecture
    blocks = blocks_of(pruned, architecture)
    for index, unit in enumerate(architecture.units):
        entry, mean_F = plan.units[index], statistics.units[index].mean_F
        gone_P = sorted(set(range(entry.width)) - set(entry.kept))
        down_DF = read_ffn_weights(subject.source, index).down_DF.double()
        bias_D = down_DF[:, gone_P] @ mean_F[gone_P]
        down = blocks[unit.block].get_submodule(unit.down.removesuffix(".weight"))
        if down.bias is not None:
            bias_D = bias_D + down.bias.double()
        down.bias = nn.Parameter(bias_D.to(pruned.dtype))
    return pruned


if __name__ == "__main__":
    main()
