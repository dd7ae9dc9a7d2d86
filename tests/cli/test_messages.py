"""What the library has to say: through logging, which the command line shows as plain lines."""

from __future__ import annotations

import logging

import pytest

from cfsp.cli.output import show_messages


def test_messages_are_plain_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    show_messages()  # of a second command in one process
    logging.getLogger("cfsp.streaming.block_pass").info("calibrate: going on at block 3 of 5")
    logging.getLogger("cfsp.selection").warning("100%% of %s", "it")
    logging.getLogger("cfsp").debug("for nobody")
    logging.getLogger("other").info("not ours")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "calibrate: going on at block 3 of 5\n100% of it\n"
