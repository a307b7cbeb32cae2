"""Files that are never half written, and places that are tried before the work."""

from __future__ import annotations

import pytest

from lamamba.utils.files import check_target, differences_in_words, read_json, write_atomically


def test_a_place_for_a_result_is_tried_first(tmp_path):
    check_target(tmp_path / "new" / "folder" / "grid.png")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        check_target(tmp_path / "new")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written .*: name another place"):
        check_target(tmp_path / "file" / "grid.png")


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
