"""Folders, tars and Hugging Face data sets of the same images agree; manifests name the bad files."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from lamamba.data.images import Images
from lamamba.data.manifest import Manifest, check_files, excluded_files, make_manifest, manifest_path
from lamamba.data.sources import FolderSource, fingerprint, open_source
from tests.data.test_images import BAD, CONVERTED, write_images, write_odd_files


def test_names_and_labels_of_a_folder(tmp_path):
    write_images(tmp_path / "bee" / "young", 1)
    write_images(tmp_path / "ant", 2)
    (tmp_path / "ant" / "notes.txt").write_text("not an image, not looked at")
    source = open_source(tmp_path)
    assert [source.file(k) for k in range(len(source))] == ["ant/000.png", "ant/001.png", "bee/young/000.png"]
    assert source.labels.tolist() == [0, 0, 1]
    (tmp_path / "cow").mkdir()
    assert FolderSource(tmp_path).empty_folders == ("cow",)
    assert FolderSource(tmp_path).label_names == ("ant", "bee")
    before = fingerprint(source)
    write_images(tmp_path / "bee", 1)
    assert fingerprint(FolderSource(tmp_path)) != before
    assert fingerprint(source, ["ant/000.png"]) != before


def write_tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def as_tars(folder, target):
    """The images of a folder as two WebDataset tars."""
    source = FolderSource(folder)
    target.mkdir()
    for half in range(2):
        samples = []
        for k in range(half, len(source), 2):
            samples += [(f"{k:04d}.png", source.read(k)), (f"{k:04d}.cls", str(source.labels[k]).encode())]
        write_tar(target / f"train-{half:03d}.tar", samples)
    return source


def test_webdataset_tars_hold_the_same_images(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    write_images(tmp_path / "images" / "ant", 3)
    write_images(tmp_path / "images" / "bee", 2, seed=1)
    folder = as_tars(tmp_path / "images", tmp_path / "tars")
    for name in (tmp_path / "tars", str(tmp_path / "tars" / "train-{000..001}.tar")):
        source = open_source(name)
        assert len(source) == 5
        assert source.file(0) == "train-000.tar/0000.png"
        assert source.label_names == ("0", "1")
        order = [0, 2, 4, 1, 3]
        assert source.labels.tolist() == folder.labels[order].tolist()
        assert [source.read(k) for k in range(5)] == [folder.read(k) for k in order]
    pixels, labels = Images(source, 16).read([4, 0])
    assert np.array_equal(pixels, Images(folder, 16).read([3, 0])[0])
    assert labels.tolist() == [1, 0]


def test_tars_that_do_not_fit_are_named(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.cls", b"dog"), ("1.png", b"x")])
    with pytest.raises(ValueError, match=r"1 of 2 images .* have no class \(the first is a.tar/1.png\)"):
        open_source(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.cls", b"dog"), ("1.png", b"x"), ("1.cls", b"cat")])
    source = open_source(tmp_path / "a.tar")
    assert (source.label_names, source.labels.tolist()) == (("cat", "dog"), [1, 0])
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b\x08 this is no tar")
    with pytest.raises(ValueError, match=r"a\.tar is damaged, compressed or no tar"):
        open_source(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=r"b-1\.tar does not exist"):
        open_source(str(tmp_path / "b-{1..3}.tar"))


def test_hugging_face_data_sets_hold_the_same_images(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    write_images(tmp_path / "images" / "ant", 2)
    write_images(tmp_path / "images" / "bee", 2, seed=1)
    folder = FolderSource(tmp_path / "images")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"image": [{"bytes": folder.read(k), "path": None} for k in range(4)], "label": folder.labels.tolist()}
    held = datasets.Dataset.from_dict(rows, features=features)
    held.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": held, "test": held.select([3])}).save_to_disk(tmp_path / "splits")
    for name in (tmp_path / "saved", tmp_path / "splits", f"datasets:{tmp_path / 'saved'}"):
        source = open_source(name)
        assert (source.label_names, source.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
        assert [source.read(k) for k in range(4)] == [folder.read(k) for k in range(4)]
    assert len(open_source(f"datasets:{tmp_path / 'splits'}@test")) == 1
    with pytest.raises(ValueError, match="has no split 'tset'; it has train, test"):
        open_source(f"datasets:{tmp_path / 'splits'}@tset")
    with pytest.raises(RuntimeError, match="cannot be had"):
        open_source(f"datasets:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_check_names_every_bad_file_by_kind(tmp_path, workers):
    write_images(tmp_path, 60 if workers == 2 else 3)                           # two processes: more than one chunk
    write_odd_files(tmp_path)
    source = open_source(tmp_path)
    manifest = make_manifest(source, check_files(source, workers))
    assert {bad.file: bad.kind for bad in manifest.bad} == BAD
    assert sum(manifest.converted.values()) == len(CONVERTED)
    assert {found.file: found.kind for found in manifest.converted_files} == CONVERTED
    strict = make_manifest(source, check_files(source, 1), strict=True)
    assert {bad.file: bad.kind for bad in strict.bad} == BAD | CONVERTED
    assert manifest.images == len(source) == (60 if workers == 2 else 3) + len(BAD) + len(CONVERTED)
    manifest.save(manifest_path(source.name))
    assert Manifest.load(tmp_path / "lamamba-manifest.json") == manifest
    excluded, note = excluded_files(source)
    assert (sorted(excluded), note) == (sorted(BAD), None)
    images = Images(source, 8, excluded=excluded)
    images.read(range(len(images)))                                             # all good
    assert images.bad == {}


def test_min_side_bounds_the_short_side(tmp_path):
    Image.new("L", (10, 90)).save(tmp_path / "a.png")
    source = open_source(tmp_path)
    assert [kind for _, kind, _, _ in check_files(source, 1)] == [""]
    assert [kind for _, kind, _, _ in check_files(source, 1, min_side=16)] == ["too small"]


def test_a_manifest_of_changed_files_still_counts_with_a_note(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"")
    source = open_source(tmp_path)
    make_manifest(source, check_files(source, 1)).save(tmp_path / "m.json")
    assert excluded_files(source) == ((), None)                                      # not in its own place
    assert excluded_files(source, tmp_path / "m.json") == (("bad.png",), None)
    write_images(tmp_path, 3)
    excluded, note = excluded_files(open_source(tmp_path), tmp_path / "m.json")
    assert excluded == ("bad.png",)
    assert "has changed since" in note
    assert "3 files then, 4 now" in note
    values = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps({**values, "version": 9}))
    with pytest.raises(ValueError, match="format version 9"):
        excluded_files(source, tmp_path / "m.json")
    (tmp_path / "m.json").write_text(json.dumps(values)[:50])
    with pytest.raises(ValueError, match=r"m\.json is missing or damaged"):
        excluded_files(source, tmp_path / "m.json")
