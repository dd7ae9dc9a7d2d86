"""What ends a command from outside, each with one line at most and a status of its own.

Ctrl-C before it has begun (130), a reader that goes (141), output that cannot be written (2).
"""

import os
import signal
import subprocess
import sys

import pytest

import cfsp.__main__
import cfsp.cli
from builders import stop
from forks import Job

# Ctrl-C while the last command's module is imported.
PROGRAM = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cfsp.cli.verify":
            os.kill(os.getpid(), signal.SIGINT)

# Whoever started the tests in the background may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
from cfsp.__main__ import main
sys.exit(main())
"""

LINE = "cfsp: interrupted before any work was done"


def test_while_modules_are_imported():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.split("\n")) == (130, ["", LINE, ""])


def test_while_the_command_line_is_read(monkeypatch, capsys):
    monkeypatch.setattr(cfsp.cli, "build_parser", stop)
    before = signal.getsignal(signal.SIGINT)
    assert cfsp.__main__.main() == 130
    assert capsys.readouterr().err == f"\n{LINE}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_reads_no_further_gets_no_traceback():
    """As `cfsp prune --help-all | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "cfsp", "prune", "--help-all"]
    ended = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


LIBRARY = """
import os
import cfsp.cli
from cfsp.__main__ import main

cfsp.cli.main = lambda: os.write(1, b"NCCL version 2\\n") and print("{}")
main()
"""


def test_what_a_library_of_several_processes_prints_is_not_the_output(forks):
    (ended,) = forks.code(LIBRARY, {"WORLD_SIZE": "2"})
    assert (ended.stdout, ended.stderr) == ("{}\n", "NCCL version 2\n")


def test_variables_of_torchrun_that_are_empty_are_those_of_one_process(forks):
    (ended,) = forks.code(LIBRARY, {"WORLD_SIZE": "", "RANK": ""})
    assert (ended.stdout, ended.stderr) == ("NCCL version 2\n{}\n", "")


@pytest.mark.parametrize(
    "wrong", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "RANK": "-1"}]
)
def test_variables_of_torchrun_that_are_no_numbers_are_one_sentence(forks, wrong):
    (ended,) = forks.code("from cfsp.__main__ import main\nprint(main())", wrong)
    assert ended.stdout == "2\n"
    assert ended.stderr.startswith(f"cfsp: {[*wrong][-1]} must be a whole number, as torchrun")
    assert ended.stderr.count("\n") == 1


# `cfsp families` warns where another transformers is installed.
AS_PROVED = """
import transformers
from cfsp.families.catalogue import proved_before
transformers.__version__ = proved_before()[0]
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_that_cannot_be_written_is_one_sentence(forks, flags):
    """As on a full disk; `--json` is more than the buffer holds."""
    code = f"""{AS_PROVED}
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.argv = ["cfsp", "families", *{flags}]
from cfsp.__main__ import main
sys.exit(main())
"""
    (ended,) = forks(Job("forks.run_code", {"code": code}))
    assert (ended.status, ended.stderr) == (
        2,
        "cfsp families: standard output cannot be written: No space left on device; the command "
        "itself is done, only what it tells is lost\n",
    )


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_that_is_closed_is_no_error(forks, flags):
    """As by `>&-`."""
    code = f"""{AS_PROVED}
import sys
from cfsp.__main__ import main
sys.argv = ["cfsp", "families", *{flags}]
out, sys.stdout = sys.stdout, None
try:
    status = main()
finally:
    sys.stdout = out
sys.exit(status)
"""
    (ended,) = forks.code(code)
    assert ended.stderr == ""


def test_work_goes_on_where_messages_cannot_be_written(forks):
    """As when its terminal is gone."""
    code = """
import logging, os
from cfsp.cli.output import show_messages
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
show_messages()
for _ in range(2):
    logging.getLogger("cfsp").warning("nobody reads this")
print("done")
"""
    (ended,) = forks.code(code)
    assert ended.stdout == "done\n"


STOPPED_TWICE = """
import os, signal, sys
import cfsp.cli
from cfsp.__main__ import main

def run(args):
    try:
        os.kill(os.getpid(), {signal})
    finally:
        os.kill(os.getpid(), {signal})
        print("cleaned up")

cfsp.cli.families.run = run
# Whoever started the tests in the background may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["cfsp", "families"]
print(main())
"""


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_who_stops_a_command_twice_lets_it_clean_up(forks, number, said):
    (ended,) = forks.code(STOPPED_TWICE.format(signal=int(number)))
    assert ended.stdout == f"cleaned up\n{128 + number}\n"
    assert ended.stderr.strip() == f"cfsp families: {said}; nothing is half-written"
