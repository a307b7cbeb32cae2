"""Progress shows speed and remaining time; what was done before a call does not count for the speed."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest

from lamamba.utils import progress
from lamamba.utils.progress import Progress, reporting


@pytest.fixture
def clock(monkeypatch, caplog):
    """Seconds that pass when the test says so, and nobody who watches a bar."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    caplog.set_level(logging.INFO, logger="lamamba")
    return now


def test_a_log_line_has_the_speed_and_the_time_left(clock, caplog):
    with reporting("auto") as report:
        report(Progress("features", 0, 1000))
        clock[0] += 20
        report(Progress("features", 50, 1000))
        assert not caplog.messages                                              # not yet half a minute
        clock[0] += 20
        report(Progress("features", 100, 1000, note="step 3/4"))
    assert caplog.messages == ["features 100/1000  2.5 images/s  6 min left  step 3/4"]


def test_resumed_work_does_not_count_for_the_speed(clock, caplog):
    with reporting("auto") as report:
        report(Progress("features", 600, 1000, resumed=600))
        clock[0] += 40
        report(Progress("features", 800, 1000, resumed=600))
    (line,) = caplog.messages
    assert line.split("  ")[1:3] == ["5 images/s", "40 s left"]


def test_a_task_that_begins_again_has_its_own_speed(clock, caplog):
    """As the pictures that a training draws every thousand steps."""
    with reporting("auto") as report:
        report(Progress("sampling", 100, 100))
        clock[0] += 1000
        report(Progress("sampling", 0, 100))
        clock[0] += 40
        report(Progress("sampling", 80, 100))
    assert caplog.messages == ["sampling 80/100  2 images/s  10 s left  "]


def test_work_that_reports_nothing_for_long_is_not_silent(clock, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    with reporting("auto") as report:
        report(Progress("timing", 3, 16, unit="networks", note="adm-256"))
        clock[0] += 60
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["timing 3/16  0.05 networks/s  4 min left  adm-256"]


def test_work_that_is_done_says_no_more(clock, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    with reporting("auto") as report:
        report(Progress("sampling", 2, 2))
        clock[0] += 60
        time.sleep(0.3)
    assert caplog.messages == []


def test_a_bar_on_a_terminal_has_them_too(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with reporting("auto") as report:
        for done in (0, 200, 400, 600):
            report(Progress("features", done, 1000))
    shown = screen.getvalue()
    assert "features" in shown
    assert "0/1000" in shown
    assert "images/s" in shown
    assert re.search(r"\d\d:\d\d<(\d\d:\d\d|\?)", shown)                    # time taken, time left


def test_functions_and_none_and_nothing_else():
    states: list[Progress] = []
    with reporting(states.append) as report:
        report(Progress("features", 1, 2))
    assert states == [Progress("features", 1, 2)]
    with reporting(None) as report:
        report(Progress("features", 1, 2))
    with pytest.raises(ValueError, match="must be \"auto\", a function of Progress values, or None"), reporting("bar"):
        pass
