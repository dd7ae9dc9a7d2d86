"""Studies 5 and 6: does pruning depend on how attention and the residual stream are built?

    python studies/architectures.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl --models DIR/trained

Trains small models on the calibration texts, equal in all but what is studied (`training.py` says
what they are): heads that share keys and values or do not; normalisation before, after, or on
both sides; attention and FFN one after the other or side by side. Then each is pruned, with and
without repair, and each of its blocks is pruned alone and left out alone. Prints Markdown: how the
loss rises, and how well angular distance ranks the blocks. Models are kept, and not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cfsp.calibration.accumulators import DISTANCES
from cfsp.planning import Criterion
from conditions import calibration_text, conditions, parser_of_texts
from damage import damage_of, loss_increase, rank_correlation
from results import Results, Row, table
from subject import Subject, load_subject
from training import ARCHITECTURES, Size, trained

ALONE_SPARSITY = 0.5
# What `cfsp prune` would take for wider models is a coarse step here.
MULTIPLE = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and print."""
    args = _parser().parse_args(arguments)
    size = Size(args.hidden, args.blocks, args.vocabulary, args.tokens, args.seqlen)
    results = Results(args.out, conditions(args, sizes=asdict(size)))
    # A seed of all architectures before the next, so that an early end has something of each.
    for seed in range(args.seeds):
        for architecture in args.architectures:
            place = trained(architecture, seed, args.data, size, args.models)
            subject = load_subject(place, args.eval, args.windows, args.seqlen)
            study(args, subject, results, {"architecture": architecture, "seed": seed})
    print()
    print_tables(results.rows, args.sparsity)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_texts("architectures", __doc__.splitlines()[0])
    size = Size()
    parser.set_defaults(seqlen=size.seqlen, samples=64, windows=48)
    parser.add_argument("--models", type=Path, required=True, help="where trained models are kept")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--seeds", type=int, default=3, help="models of each architecture")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.5])
    for name in ("hidden", "blocks", "vocabulary", "tokens"):
        parser.add_argument(f"--{name}", type=int, default=getattr(size, name))
    return parser


def study(
    args: argparse.Namespace, subject: Subject, results: Results, model: dict[str, Any]
) -> None:
    """Measure one model: dense, pruned, repaired, and block by block."""
    text = calibration_text(args)
    statistics = subject.calibrate(text)
    found = results.measure({"what": "dense", **model}, lambda: subject.quality(subject.model))
    dense = {label: found[label] for label in subject.texts}
    for sparsity in args.sparsity:
        for blocks in ("angular", "uniform"):
            plan = subject.plan(statistics, sparsity, Criterion(blocks), MULTIPLE)
            key = {"what": "pruned", **model, "sparsity": sparsity, "blocks": blocks}
            results.measure(
                key,
                lambda plan=plan: {
                    "plain": _rise(subject.quality_of(plan), dense),
                    "repaired": _rise(subject.quality_repaired(text, plan), dense),
                },
            )
    for block in range(len(statistics.blocks)):
        results.measure(
            {"what": "alone", **model, "block": block},
            lambda block=block: damage_of(subject, statistics, block, ALONE_SPARSITY, dense),
        )


def _rise(after: dict[str, float], dense: dict[str, float]) -> float:
    return round(loss_increase(after, dense), 5)


def print_tables(rows: Sequence[Row], sparsities: Sequence[float]) -> None:
    """Print the loss of the dense models, its rise by pruning, and the rank correlations."""
    dense = [row for row in rows if row["what"] == "dense"]
    texts = [key for key in dense[0] if key not in ("what", "architecture", "seed")]
    print(table(dense, ["architecture"], texts))
    pruned = [row for row in rows if row["what"] == "pruned"]
    for sparsity in sparsities:
        print(f"\nrise of the loss in nats a token, {sparsity:.0%} of FFN channels removed\n")
        chosen = [row for row in pruned if row["sparsity"] == sparsity]
        print(table(chosen, ["architecture", "blocks"], ["plain", "repaired"], 3))
    print(f"\nrank correlation with the rise of the loss, {ALONE_SPARSITY:.0%} of one block\n")
    print(table(correlations(rows), ["architecture", "damage"], DISTANCES, 2))


def correlations(rows: Sequence[Row]) -> list[Row]:
    """Return for every model how well each distance ranks its blocks by either damage."""
    models: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["what"] == "alone":
            models.setdefault((row["architecture"], row["seed"]), []).append(row)
    return [
        {
            "architecture": architecture,
            "damage": damage,
            **{
                name: rank_correlation([r[name] for r in blocks], [r[damage] for r in blocks])
                for name in DISTANCES
            },
        }
        for damage in ("pruned", "left out")
        for (architecture, _), blocks in models.items()
    ]


if __name__ == "__main__":
    main()
