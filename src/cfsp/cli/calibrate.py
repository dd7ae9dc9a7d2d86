"""Run a text through a model once and save the statistics that plans are made from.

cfsp calibrate MODEL --data wikitext2 --data c4 --out stats.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_file_is_free, check_is_outside
from cfsp.cli.options import Parser, add_model, add_options, settings_from
from cfsp.cli.output import Told, human_bytes
from cfsp.processes import joined, process_count, take_own_accelerator
from cfsp.settings import Budget, CalibrationText, Compute, Criterion, PruneSettings
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.work_dir import output_work_dir, remove_finished_work
from cfsp.text.sources import check_texts


def add_options_to(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="safetensors file")
    add_options(parser, parser, Budget, fields=("parts",))
    add_options(parser, parser, Criterion, fields=("block_metric",))
    add_options(parser, parser, CalibrationText)
    add_options(parser, parser, Compute)


def run(args: argparse.Namespace) -> Told:
    check_texts(args.data)

    from cfsp.checkpoint.loading import compute_device
    from cfsp.pipeline import calibrate_source
    from cfsp.result.making import seconds_in_words
    from cfsp.streaming.runtime import runtime_identity, runtime_of
    from cfsp.text.tokenizers import load_tokenizer

    remove_finished_work(args.out)
    check_file_is_free(args.out)
    settings = PruneSettings(
        settings_from(args, Budget),
        settings_from(args, Criterion),
        settings_from(args, CalibrationText),
        settings_from(args, Compute),
    )
    compute, parts = settings.compute, settings.budget.parts
    take_own_accelerator(compute.device)
    source = open_checkpoint(args.model, parts=parts)
    check_is_outside(args.out, source.directory)
    identity = {
        "command": "calibrate",
        "--parts": list(parts),
        "--block-metric": settings.criterion.block_metric,
        # Before the pass it is decided what fits into memory.
        "model": source.identity,
        **runtime_identity(runtime_of(compute, source)),
    }
    with (
        joined(compute_device(compute.device)) as team,
        output_work_dir(args.out, identity, compute.memory_budget, team) as work_dir,
    ):
        # Another run may have finished since the first look.
        team.from_first(lambda: check_file_is_free(args.out))
        tokenizer = load_tokenizer(source.directory)
        statistics = calibrate_source(source, tokenizer, settings, work_dir)
        if team.is_first:
            statistics.save(args.out)
    if not team.is_first:
        return None
    facts: dict[str, Any] = {
        "out": str(args.out),
        "blocks": len(statistics.blocks),
        "calibration_tokens": statistics.tokens,
        "sources": statistics.record.sources,
        "processes": process_count(),
        "seconds": work_dir.watch.seconds,
        "passes": work_dir.times_json(),
        "peak_rss_bytes": peak_rss_bytes(),
    }

    def say() -> None:
        print(
            f"{statistics.tokens:,} tokens through {len(statistics.blocks)} blocks: "
            f"{seconds_in_words(facts['seconds'])}; peak memory "
            f"{human_bytes(facts['peak_rss_bytes'])}"
        )
        print(f"written to {args.out}")

    return facts, say
