"""lamamba.check_data: counts, classes and bad files by kind as values; progress by file."""

from __future__ import annotations

import pytest

import lamamba
from lamamba.data.manifest import Manifest
from tests.data.test_images import BAD, CONVERTED, write_images, write_odd_files


def test_a_folder_with_classes(tmp_path):
    write_images(tmp_path / "ant", 3)
    write_images(tmp_path / "bee", 2)
    (tmp_path / "bee" / "001.png").write_bytes(b"")
    (tmp_path / "bee" / "notes.txt").write_text("")
    seen = []
    result = lamamba.check_data(lamamba.CheckDataOptions(source=str(tmp_path), workers=1), progress=seen.append)
    assert (result.num_files, result.num_good) == (5, 4)
    assert result.classes == {"ant": 3, "bee": 2}
    assert result.bad == {"empty": ("bee/001.png",)}
    assert result.path == tmp_path / "lamamba-manifest.json"
    assert Manifest.load(result.path) == result.manifest
    assert [(state.task, state.done, state.total) for state in seen] == [("checking", k, 5) for k in range(1, 6)]
    assert [state.note for state in seen] == ["", "", "", "", "1 bad"]
    for line in ("5 files, 2 classes with 2 to 3 files", "good      4", "bad       1", "bee/001.png: empty (0 bytes)",
                 "left out  1 .txt"):
        assert line in str(result)


def test_a_manifest_takes_the_place_of_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: it is a \.json file"):
        lamamba.CheckDataOptions(source=str(tmp_path), manifest=tmp_path / "a.png")


def test_kinds_are_those_of_the_manifest_and_strict_adds_conversions(tmp_path):
    write_odd_files(tmp_path)
    options = lamamba.CheckDataOptions(source=str(tmp_path), workers=1, manifest=tmp_path / "m.json")
    result = lamamba.check_data(options, progress=None)
    assert {file: kind for kind, files in result.bad.items() for file in files} == BAD
    assert result.classes == {}
    assert "16-bit  2 (converted): grey16.png, rgb16.png" in str(result)
    strict = lamamba.CheckDataOptions(source=str(tmp_path), workers=1, manifest=tmp_path / "m.json", strict=True)
    result = lamamba.check_data(strict, progress=None)
    assert {file: kind for kind, files in result.bad.items() for file in files} == BAD | CONVERTED


def test_a_manifest_that_cannot_be_written(tmp_path):
    write_images(tmp_path / "images", 1)
    (tmp_path / "file").write_text("")
    options = lamamba.CheckDataOptions(source=str(tmp_path / "images"), manifest=tmp_path / "file" / "m.json")
    with pytest.raises(OSError, match="name a path that can be written"):
        lamamba.check_data(options, progress=None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"min_side": 0}, "min_side=0 must be at least 1"), ({"workers": 0}, "workers=0 must be at least 1"),
    ({"strict": 1}, "strict=1 must be true or false"),
])
def test_options_are_checked_when_made(changes, message):
    with pytest.raises(ValueError, match=message):
        lamamba.CheckDataOptions(source="images", **changes)
