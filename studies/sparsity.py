"""Study 4: how the loss rises from 5% to 70% of the FFN channels, and where the knee is.

    python studies/sparsity.py --data DIR/wikitext2/validation.parquet \
        --data DIR/c4/train.jsonl --eval DIR/wikitext2/test.parquet \
        --eval DIR/c4/validation.jsonl

Every sparsity from one calibration, without repair and, where `--repaired` says so, with it. The
last column is what the last tenth of the channels costs: the slope of the curve, in nats a token
for each 10% of the channels. Prints Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.planning import model_size
from conditions import calibrated, calibration_text, opened, parser_of_model
from damage import loss_increase
from results import Row

SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
REPAIRED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of_model("sparsity", __doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--repaired", type=float, nargs="*", default=list(REPAIRED))
    args = parser.parse_args(arguments)
    subject, results = opened(args)
    text, size = calibration_text(args), model_size(subject.source)
    statistics = calibrated(args, subject)
    results.measure(
        {"sparsity": 0.0, "restore": "none"},
        lambda: {"parameters": size.parameters, **subject.quality(subject.model)},
    )
    for restore, sparsities in (("none", args.sparsity), ("ridge", args.repaired)):
        for sparsity in sparsities:
            plan = subject.plan(statistics, sparsity)
            results.measure(
                {"sparsity": sparsity, "restore": restore},
                lambda plan=plan, restore=restore: {
                    "parameters": size.parameters_with(plan.kept_widths),
                    **(
                        subject.quality_of(plan)
                        if restore == "none"
                        else subject.quality_repaired(text, plan)
                    ),
                },
            )
    print(f"\n{curve(results.rows, list(subject.texts))}")


def curve(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Return both curves as Markdown: perplexity, rise of the loss, and its slope."""
    dense = {text: rows[0][text] for text in texts}
    lines = [
        f"| restore | sparsity | parameters removed | {' | '.join(texts)} | rise | slope |",
        "|---|---:|---:|" + "---:|" * (len(texts) + 2),
    ]
    for restore in ("none", "ridge"):
        before, rise_before = 0.0, 0.0
        chosen = [row for row in rows if row["restore"] == restore and row["sparsity"] > 0]
        for row in sorted(chosen, key=lambda row: row["sparsity"]):
            rise = loss_increase({text: row[text] for text in texts}, dense)
            slope = (rise - rise_before) / (row["sparsity"] - before) / 10
            cells = [f"{row[text]:.1f}" for text in texts]
            removed = 1 - row["parameters"] / rows[0]["parameters"]
            lines.append(
                f"| {restore} | {row['sparsity']:.0%} | {removed:.1%} | {' | '.join(cells)} "
                f"| {rise:.3f} | {slope:.3f} |"
            )
            before, rise_before = row["sparsity"], rise
    return "\n".join(lines)


if __name__ == "__main__":
    main()
