"""Study 4: how the loss rises from 5% to 70% of the FFN channels, and where the knee is.

    python studies/run.py 4 --texts DIR

Every sparsity from one calibration, without repair and, where `--repaired` says so, with it. The
last column is what the last tenth of the channels costs: the slope of the curve, in nats a token
for each 10% of the channels. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cfsp.planning.make import model_size
from conditions import calibration_text, parser_of_model
from damage import loss_increase
from results import Row
from study import Study

SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
REPAIRED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(arguments)
    study = Study(args)
    study.results.measure({"sparsity": 0.0, "restore": "none"}, _dense, study)
    for restore, sparsities in (("none", args.sparsity), ("ridge", args.repaired)):
        for sparsity in sparsities:
            key = {"sparsity": sparsity, "restore": restore}
            study.results.measure(key, _pruned, study, sparsity, restore)
    print(f"\n{curve(study.results.rows, study.texts)}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = parser_of_model("sparsity", __doc__.splitlines()[0])
    found.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    found.add_argument("--repaired", type=float, nargs="*", default=list(REPAIRED))
    return found


def _dense(study: Study) -> Row:
    subject = study.subject
    parameters = model_size(subject.source).parameters
    return {"parameters": parameters, **subject.quality(subject.model)}


def _pruned(study: Study, sparsity: float, restore: str) -> Row:
    subject = study.subject
    plan = subject.plan(study.statistics(), sparsity)
    parameters = model_size(subject.source).parameters_with(plan.kept_widths)
    if restore == "none":
        return {"parameters": parameters, **subject.quality_of(plan)}
    text = calibration_text(study.args)
    return {"parameters": parameters, **subject.quality_repaired(text, plan)}


def curve(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Return both curves as Markdown: perplexity, rise of the loss, and its slope.

    Ideal decoding is the ratio of the parameters, which is that of the bytes that are read.
    """
    dense, parameters = {text: rows[0][text] for text in texts}, rows[0]["parameters"]
    lines = [
        "| repair | FFN channels removed | parameters removed | ideal decoding "
        f"| {' | '.join(texts)} | rise | slope |",
        "|---|---:|---:|---:|" + "---:|" * (len(texts) + 2),
    ]
    for restore in ("none", "ridge"):
        before, rise_before = 0.0, 0.0
        chosen = [row for row in rows if row["restore"] == restore and row["sparsity"] > 0]
        for row in sorted(chosen, key=lambda row: row["sparsity"]):
            rise = loss_increase({text: row[text] for text in texts}, dense)
            slope = (rise - rise_before) / (row["sparsity"] - before) / 10
            cells = [f"{row[text]:.1f}" for text in texts]
            left = row["parameters"] / parameters
            lines.append(
                f"| {restore} | {row['sparsity']:.0%} | {1 - left:.1%} | {1 / left:.2f}x "
                f"| {' | '.join(cells)} | {rise:.2f} | {slope:.2f} |"
            )
            before, rise_before = row["sparsity"], rise
    return "\n".join(lines)


if __name__ == "__main__":
    main()
