"""Every kind of bad file is found, named and skipped."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lamamba.cli.main import main
from lamamba.data.check import MANIFEST, check_folder, fault_of
from lamamba.data.images import ImageFolder
from tests.data.test_images import write_images


def png_of(width, height):
    """A PNG that claims this size and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encoded(mode, kind, size=(40, 30)):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    deep = Image.fromarray(np.full(size[::-1], 40000, dtype=np.uint16))
    (deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(file, kind)
    return file.getvalue()


BAD = {
    "empty.png": ("empty", b""),
    "text.jpg": ("not an image", b"hello"),
    "short.jpg": ("truncated", encoded("RGB", "JPEG")[:600]),
    "short.png": ("truncated", encoded("RGB", "PNG")[:600]),
    "dot.png": ("too small", encoded("RGB", "PNG", (1, 1))),
    "ink.jpg": ("CMYK", encoded("CMYK", "JPEG")),
    "deep.png": ("16-bit", encoded("I;16", "PNG")),
    "bomb.png": ("decompression bomb", png_of(20000, 20000)),
    "lab.tif": ("other colours", encoded("LAB", "TIFF")),
}


@pytest.mark.parametrize("name", BAD)
def test_every_kind_of_fault_is_told_apart(tmp_path, name):
    kind, data = BAD[name]
    (tmp_path / name).write_bytes(data)
    fault = fault_of(tmp_path / name)
    assert fault is not None
    assert fault[0] == kind
    assert fault[1]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_what_becomes_rgb_is_good(tmp_path, mode):
    (tmp_path / "a.png").write_bytes(encoded(mode, "PNG"))
    assert fault_of(tmp_path / "a.png") is None


@pytest.fixture
def photos(tmp_path):
    """Two classes of 40 and 3 good images, and one bad file of each kind in the first."""
    folder = tmp_path / "photos"
    write_images(folder / "ant", 40)
    write_images(folder / "cat", 3, seed=1)
    for name, (_, data) in BAD.items():
        (folder / "ant" / name).write_bytes(data)
    return folder


def test_the_result_does_not_depend_on_the_number_of_processes(photos):
    seen = []
    alone = check_folder(photos, workers=1, on_progress=lambda *numbers: seen.append(numbers))
    assert check_folder(photos, workers=2) == alone
    assert seen[-1] == (52, 52)
    assert alone.classes == {"ant": 40, "cat": 3}
    assert {name.removeprefix("ant/"): kind for name, (kind, _) in alone.bad.items()} == {
        name: kind for name, (kind, _) in BAD.items()
    }


def test_the_command_names_bad_files_and_training_skips_them(photos, capsys):
    with pytest.raises(SystemExit) as status:
        main(["data", "check", str(photos), "--workers", "1"])
    out = capsys.readouterr().out
    assert status.value.code == 1
    assert "52 images, 43 good, 2 classes" in out
    assert "images of a class: 3 (cat) to 40 (ant)" in out
    assert all(f"ant/{name}: " in out for name in BAD)
    manifest = json.loads((photos / MANIFEST).read_text())
    assert (manifest["version"], manifest["good"], len(manifest["bad"])) == (1, 43, len(BAD))

    images = ImageFolder(photos, 16, max_bad=0)
    assert (len(images), images.num_skipped) == (43, len(BAD))
    assert images.read(range(43))[0].shape == (43, 3, 16, 16)

    for name in BAD:
        (photos / "ant" / name).unlink()
    assert main(["data", "check", str(photos), "--workers", "1"]) == 0
    assert json.loads((photos / MANIFEST).read_text())["bad"] == {}


@pytest.mark.parametrize(("text", "said"), [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"version": 9, "bad": {}}', "has format version 9"),
])
def test_a_manifest_that_cannot_be_read_is_an_error(photos, text, said):
    (photos / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=said):
        ImageFolder(photos, 16)


def test_files_that_turn_bad_are_replaced_and_counted(tmp_path, caplog):
    write_images(tmp_path, 6)
    good = ImageFolder(tmp_path, 16).read([2, 5, 0])[0]
    (tmp_path / "001.png").write_text("hello")
    (tmp_path / "004.png").write_bytes(b"")
    images = ImageFolder(tmp_path, 16, max_bad=2)
    for _ in range(2):                                                          # and it stays so
        assert np.array_equal(images.read([1, 4, 0])[0], good)                  # the next one each
    assert [path.name for path in sorted(images.bad)] == ["001.png", "004.png"]
    assert len(caplog.records) == 2
    (tmp_path / "000.png").write_bytes(b"")
    images = ImageFolder(tmp_path, 16, max_bad=2)
    with pytest.raises(ValueError, match=r"3 images cannot be read, more than the 2 .*000.png.*lamamba data check"):
        images.read([0, 1, 4])


@pytest.mark.parametrize(("arguments", "said"), [
    (["data"], "say what to do with which folder"),
    (["data", "chekc", "x"], "did you mean 'check'"),
    (["data", "check", "nowhere"], "nowhere is not a folder"),
    (["data", "check", ".", "--workers", "0"], "--workers 0 must be at least 1"),
])
def test_mistakes(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
