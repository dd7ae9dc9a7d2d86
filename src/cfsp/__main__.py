"""The console script `cfsp`, which is the same as `python -m cfsp`."""

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = "\ncfsp: interrupted before any work was done\n"


def main() -> int:
    """Run one command and return its exit status; Ctrl-C never shows a traceback."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # not if whoever started us ignores it
        signal.signal(signal.SIGINT, _leave)
    from cfsp.cli import main as run

    signal.signal(signal.SIGINT, previous)
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write(_INTERRUPTED)
        return 130


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # No exception: modules that are half imported may turn it into another one.
    os.write(2, _INTERRUPTED.encode())
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
