"""Files that are never half written, and places that are tried before the work."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.sampling.npz import write_npz
from lamamba.utils.files import (
    check_folder,
    check_target,
    differences_in_words,
    read_json,
    write_atomically,
    write_json,
)
from lamamba.viz.films import save_film
from lamamba.viz.grids import save_picture
from tests.files import full_disk


def test_a_place_for_a_result_is_tried_first(tmp_path):
    check_target(tmp_path / "new" / "folder" / "grid.png")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        check_target(tmp_path / "new")
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "grid.png", tmp_path / "file" / "in" / "it" / "grid.png"):
        with pytest.raises(NotADirectoryError, match=f"{place} cannot be written: .*file is a file; nothing was done"):
            check_target(place)


def test_a_place_for_a_folder_is_looked_at_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    check_folder(tmp_path / "new" / "folder", is_new=True)
    check_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_folder(Path("new"), is_new=True)
    for place in (Path("file"), Path("file") / "in" / "it"):
        with pytest.raises(NotADirectoryError, match=f"{place} cannot be made: .*file is a file; nothing was done"):
            check_folder(place)
    with pytest.raises(FileExistsError, match="exists already; remove it or name another place"):
        check_folder(tmp_path, is_new=True)
    monkeypatch.setattr(os, "access", lambda *given: False)                     # as for a user without the right
    with pytest.raises(PermissionError, match="may only be read"):
        check_folder(Path("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a.json", '{"version": 2}')
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.json", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json", 2) == {"version": 2}
    with pytest.raises(ValueError, match="has format version 2, this lamamba reads up to 1; upgrade it"):
        read_json(tmp_path / "a.json", 1)


def test_differences_are_told_by_name():
    assert differences_in_words({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 there, 3 here", "d: 'nothing' there, 4 here",
    ]


@pytest.mark.parametrize(("content", "said"), [
    (b"\xff{}", "is not text in UTF-8"), (b'{"a": NaN}', "NaN is no number in JSON"), (b"[]", "holds no JSON object"),
    (b'{"a": -Infinity}', "-Infinity is no number in JSON"), (b'{"version": true}', "version=True must be a whole"),
    (b'{"a": ' + b"9" * 5000 + b"}", "damaged"), (b"[" * 100_000, "nested too deeply"), (b"", "damaged"),
])
def test_json_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json.*{said}"):
        read_json(tmp_path / "a.json", 1)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"version": 1}')
    assert read_json(tmp_path / "a.json", 1) == {"version": 1}


@pytest.mark.parametrize("write", [
    lambda path: write_atomically(path, "x" * 100_000), lambda path: write_json(path, {"x": "y" * 100_000}),
    lambda path: save_picture(Image.effect_noise((300, 300), 50), path),
    lambda path: write_npz(path, (8, 8, 3), [np.zeros((500, 8, 8, 3), np.uint8)], None, 500),
    lambda path: save_film([Image.effect_noise((300, 300), 50)] * 2, path.with_suffix(".gif"), 5.0),
], ids=["text", "json", "picture", "npz", "film"])
def test_a_full_disk_is_told_with_the_file(tmp_path, write):
    (tmp_path / "a.out").write_text("old")
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: .*a\.(out|gif)"):
        write(tmp_path / "a.out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.out"]
    assert (tmp_path / "a.out").read_text() == "old"
