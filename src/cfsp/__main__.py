"""The console script `cfsp`, which is the same as `python -m cfsp`."""

import os
import select
import signal
import sys
from types import FrameType

_INTERRUPTED = "\ncfsp: interrupted before any work was done\n"


def main() -> int:
    """Run one command and return its exit status; neither Ctrl-C nor `| head` shows a traceback."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # not if whoever started us ignores it
        signal.signal(signal.SIGINT, _leave)
    from cfsp.cli import main as run
    from cfsp.cli.output import drop
    from cfsp.errors import UsageError
    from cfsp.processes import process_count, process_rank

    signal.signal(signal.SIGINT, previous)
    try:
        process_rank()  # every later error names it
        several = process_count() > 1
    except UsageError as error:
        sys.stderr.write(f"cfsp: {error}\n")
        return error.exit_status
    if several and sys.stdout is not None:
        _keep_output()
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write(_INTERRUPTED)
        return 130
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        drop(sys.stdout)
        return 128 + signal.SIGPIPE


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # No exception: modules that are half imported may turn it into another one.
    os.write(2, _INTERRUPTED.encode())
    os._exit(130)


def _keep_output() -> None:
    """Let what libraries print by themselves go to standard error: NCCL does, and older gloos."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding)
    os.dup2(2, sys.stdout.fileno())
    sys.stdout = own


def _reader_has_gone() -> bool:
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


if __name__ == "__main__":
    sys.exit(main())
