"""Exceptions as one line and a status, whatever the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import lamamba as package
from lamamba.cli import info
from lamamba.cli.main import main
from lamamba.options.training import load_recipe

COMPARE = ["evaluate", "compare", "a.json", "a.json"]


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("y"), RecursionError("z"), AssertionError(), IndexError()])
def test_an_exception_that_nobody_foresaw_is_reported_as_a_bug(lamamba, monkeypatch, tmp_path, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(info, "main", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, _, said = lamamba("info", "s")
    assert (status, len(said.splitlines())) == (70, 1)
    (file,) = tmp_path.glob("lamamba-*.txt")
    assert said.startswith(f"lamamba info: a bug ({type(error).__name__}: ")
    assert f"its traceback is in {file}: please send that to " in said
    assert "in fail" in file.read_text(encoding="utf-8")


def test_a_traceback_is_shown_where_it_is_wanted(monkeypatch):
    monkeypatch.setenv("LAMAMBA_TRACEBACK", "1")
    monkeypatch.setattr(info, "main", lambda arguments: {}["x"])
    with pytest.raises(KeyError):
        main(["info"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_terminal_lacks_ends_nothing(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(info, "main", lambda arguments: print("4.2 ± 1 猫"))
    assert main(["info"]) == 0
    assert main(["猫"]) == 2
    plus = "\\xb1" if encoding == "ascii" else "±"
    assert out.buffer.getvalue().decode(encoding).strip() == f"4.2 {plus} 1 \\u732b"
    assert b"\\u732b" in err.buffer.getvalue()


@pytest.mark.parametrize(("name", "content", "command", "said"), [
    ("metrics.jsonl", b'{"step": 1}\xff', ["plot", "metrics.jsonl"], "metrics.jsonl is not text in UTF-8"),
    ("r.toml", b"steps = 3\xff", ["train", "./r.toml", "--dry-run"], "r.toml is not text in UTF-8"),
    ("r.toml", b"[model]\nwidth = 'x'", ["train", "./r.toml", "--dry-run"], "r.toml: model.width='x' must be a whole"),
    ("r.toml", b"[model]\nwidht = 8", ["train", "./r.toml", "--dry-run"], "r.toml: option 'model.widht' is unknown"),
    ("r.toml", b"steps = inf", ["train", "./r.toml", "--dry-run"], "r.toml: steps=inf must be"),
    ("a.json", b'{"version": 1, "entries": [NaN]}', COMPARE, "a.json is missing or damaged: NaN is no number"),
    ("a.json", b"[" * 100_000, COMPARE, "a.json is missing or damaged: it is nested"),
])
def test_files_that_are_wrong_are_named_with_their_fault(lamamba, name, content, command, said):
    Path(name).write_bytes(content)
    status, _, error = lamamba(*command)
    assert (status, len(error.strip().splitlines()), said in error) == (2, 1, True), error


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert load_recipe(str(tmp_path / "r.toml")).steps == 3


def test_a_current_folder_that_was_removed_is_said_to_be(lamamba, tmp_path):
    tmp_path.rmdir()
    for command in (["info", "s"], ["plot", "run"], ["bench", "--json", "b.json"]):
        said = "the current folder was removed; change to one that exists (cd, os.chdir)"
        assert lamamba(*command)[::2] == (2, f"lamamba {command[0]}: {said}\n")
    with pytest.raises(FileNotFoundError, match="the current folder was removed"):
        package.doctor()
