"""Counts of what was tried and survived, printed as a table at the end."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "/faults/" in str(item.path).replace(os.sep, "/"):
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def count():
    """Few in a normal test run, all of them where the variable LAMAMBA_FAULTS says full: count(few, all)."""
    return lambda few, full: full if os.environ.get("LAMAMBA_FAULTS") == "full" else few


@pytest.fixture
def tally(record_property):
    """tally(fault, tried, survived): a row of the table; what did not survive fails the test."""
    def add(fault, tried, survived):
        record_property("tally", (fault, tried, survived))
        assert survived == tried > 0, f"{fault}: {survived} of {tried} survived"
    return add


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, row in getattr(report, "user_properties", ()):
                if name == "tally" and report.when == "call":
                    fault, tried, survived = row
                    before = rows.get(fault, (0, 0))
                    rows[fault] = (before[0] + tried, before[1] + survived)
    if rows:
        terminalreporter.section("faults")
        width = max(map(len, rows))
        terminalreporter.write_line(f"{'fault':<{width}}  tried  survived")
        for fault, (tried, survived) in sorted(rows.items(), key=lambda row: (int(row[0].split()[0]), row[0])):
            terminalreporter.write_line(f"{fault:<{width}}  {tried:>5}  {survived:>8}")
