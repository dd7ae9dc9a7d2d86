"""Where and in what to compute."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.settings.options import check_declared, option, parse_size

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Compute:
    """Where to compute and in what; `cfsp.streaming.runtime.resolve` makes `auto` definite.

    Attributes:
        device: `auto` or a device that torch knows.
        dtype: `auto` or a name.
        batch_windows: windows that pass a block together; None for about 4096 tokens.
        memory_budget: bytes of hidden states above which they go to a file; None for a share
            of the available memory.
    """

    device: str = option("auto", "cpu, cuda, cuda:1, mps, ...", default="an accelerator")
    dtype: str = option(
        "auto", "what to compute in", choices=DTYPES, default="the model's own", advanced=True
    )
    batch_windows: int | None = option(
        None,
        "windows that pass a block together",
        kind=int,
        least=1,
        metavar="N",
        default="about 4096 tokens",
        advanced=True,
    )
    memory_budget: int | None = option(
        None,
        "hidden states above this size (2GB, 512MiB) go to a file beside the output",
        kind=parse_size,
        metavar="SIZE",
        default="half of the available memory",
        advanced=True,
    )

    def __post_init__(self) -> None:
        check_declared(self)
