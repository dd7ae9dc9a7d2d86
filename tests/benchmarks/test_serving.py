"""benchmarks/serving.py: what it says before it starts; `make serve-check` runs it."""

from __future__ import annotations

import sys

import pytest

import serving


def test_servers_that_are_not_installed_are_named_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(serving, "_pruned", lambda name, work: pytest.fail("it started"))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--server", "mlx-lm server"])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "mlx_lm not installed here; `make serve-check` installs all servers" in error
