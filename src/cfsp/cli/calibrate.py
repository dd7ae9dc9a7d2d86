"""`cfsp calibrate`: one forward pass over a text, saved for any number of plans."""

from __future__ import annotations

import argparse
from pathlib import Path

from cfsp.cli import arguments
from cfsp.cli.output import human_bytes, print_json


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "calibrate",
        "run a text through a model once and save the statistics that plans are made from",
        "cfsp calibrate MODEL --data wikitext2 --data c4 --out stats.safetensors",
    )
    arguments.add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="safetensors file")
    arguments.add_calibration_text(parser)
    arguments.add_compute(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrate and save."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.errors import OutputError
    from cfsp.manifest import Stopwatch, peak_rss_bytes
    from cfsp.pipeline import calibrate_source
    from cfsp.text.tokenizers import load_tokenizer

    if args.out.exists():
        raise OutputError(f"{args.out} exists already; choose another file")
    source = open_checkpoint(args.model, args.revision)
    watch = Stopwatch()
    with watch.stage("calibrate"):
        statistics = calibrate_source(
            source,
            load_tokenizer(source.directory),
            arguments.calibration_text(args),
            arguments.compute(args),
        )
    statistics.save(args.out)
    facts = {
        "out": str(args.out),
        "blocks": len(statistics.blocks),
        "calibration_tokens": statistics.tokens,
        "sources": statistics.record.sources,
        "seconds": watch.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if args.json:
        print_json(facts)
        return
    seconds = watch.seconds["calibrate"]
    print(
        f"{statistics.tokens:,} tokens through {len(statistics.blocks)} blocks in {seconds:.1f} s "
        f"({statistics.tokens / seconds:,.0f} tokens/s); "
        f"peak memory {human_bytes(peak_rss_bytes())}\nwritten to {args.out}"
    )
