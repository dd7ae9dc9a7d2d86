"""Write a checkpoint for llama.cpp, vLLM, mlx-lm or OpenVINO; verify the copy.

cfsp export smaller --to gguf --type q8_0 --out smaller.gguf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.cli.options import Parser, add_model
from cfsp.cli.output import Told, human_bytes

if TYPE_CHECKING:
    from cfsp.exports.registry import ExportReport

# Spelled out here, because their home imports torch; a test compares.
TARGETS = ("gguf", "vllm", "mlx-lm", "openvino")


def add_options_to(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--to", required=True, choices=TARGETS, help="format of the copy")
    parser.add_argument(
        "--out", required=True, type=Path, help="new directory; for gguf a new .gguf file"
    )
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="gguf: f32, f16, bf16, q8_0 or, through llama.cpp, q4_k_m, q5_k_m, q6_k, ...; "
        "openvino: f32 or f16 (default: the checkpoint's own; f16 for bf16 there)",
    )
    parser.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="gguf: llama.cpp's name of the pre-tokenizer, where it cannot be told",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read the copy back and compare its logits with the checkpoint's",
    )


def run(args: argparse.Namespace) -> Told:
    from cfsp.exports.registry import export

    report = export(
        args.model,
        args.to,
        args.out,
        weight_type=args.type,
        pre_tokenizer=args.pre_tokenizer,
        verify=not args.no_verify,
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    return report.to_json(), lambda: print_report(report)


def print_report(report: ExportReport) -> None:
    print(f"{report.layout}; {human_bytes(report.nbytes)}")
    check = report.verification
    if check is None:
        print("not verified")
    else:
        print(
            f"verified by {check.reader}: logits over {check.tokens} tokens differ by at most "
            f"{check.max_difference:.2g} (relative error {check.relative_error:.2g})"
        )
    print(f"written to {report.out}")
    if report.serve:
        print(f"serve it: {report.serve}")
