"""What tests of commands share."""

from __future__ import annotations

import pytest

from lamamba.cli.main import main


@pytest.fixture
def lamamba(capsys, monkeypatch, tmp_path):
    """Run a command in this process, in an empty folder: (exit status, what it printed, what it complained)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMAMBA_TRACEBACK", raising=False)

    def call(*arguments):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
