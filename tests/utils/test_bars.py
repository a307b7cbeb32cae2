"""Long work says how fast it goes and how long the rest takes, and does not count what was found on disk."""

from __future__ import annotations

import io

import pytest

from lamamba.utils import bars as progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_plain_line_has_the_speed_and_the_time_left(clock, capsys):
    with progress.WorkBar("features", 1000) as bar:
        clock[0] += 20
        bar(50)
        assert capsys.readouterr().out == ""                                    # not yet half a minute
        clock[0] += 20
        bar(100, "step 3/4")
        assert capsys.readouterr().out == "features 100/1000  2.5 images/s  step 3/4  360 s left\n"


def test_what_was_there_does_not_count_for_the_speed(clock, capsys):
    with progress.WorkBar("features", 1000) as bar:
        bar.skip(600)
        clock[0] += 40
        bar(800)
    assert capsys.readouterr().out == "features 800/1000  5 images/s  40 s left\n"


def test_a_bar_on_a_terminal_has_them_too(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.WorkBar("features", 1000) as bar:
        for done in (200, 400, 600):
            bar(done)
    shown = screen.getvalue()
    assert "600/1000" in shown
    assert "images/s" in shown
    assert "0:00:" in shown or "-:--:--" in shown
