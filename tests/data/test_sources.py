"""Folders, tars and Hugging Face data sets of the same images agree; manifests name the bad files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.data.image_files import JUNK_REASON, image_extensions, number_classes
from lamamba.data.images import Images, read_bad_files
from lamamba.data.manifest import Manifest, check_files, excluded_files, make_manifest, manifest_path
from lamamba.data.sources import FolderSource, fingerprint, open_source
from tests.data.test_images import BAD, CONVERTED, encoded, write_images, write_odd_files


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


JUNK = (
    ".ipynb_checkpoints/a.png", "__MACOSX/cats/._0.png", "@eaDir/cats/thumb.jpg", "cats/._0.png", "cats/.hidden/b.png",
    "cats/Thumbs.db", "dogs/.DS_Store", "$RECYCLE.BIN/c.png", ".Trash/d.png", "dogs/@eaDir/e.png", "desktop.ini",
)


def test_what_systems_put_beside_images_is_no_class_and_no_image(tmp_path, caplog):
    for name in ("cats", "dogs"):
        write_images(tmp_path / name, 2)
    for name in JUNK:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "cats" / "000.png", tmp_path / name)
    source = open_source(tmp_path)
    assert (source.label_names, source.labels.tolist()) == (("cats", "dogs"), [0, 0, 1, 1])
    assert source.left_out.counts == {JUNK_REASON: len(JUNK)}
    assert f"{len(JUNK)} files left out: {len(JUNK)} hidden or of the system (" in caplog.text
    hidden = tmp_path / ".cache"                                                # only names below the source count
    shutil.copytree(tmp_path / "cats", hidden)
    assert len(open_source(hidden)) == 2


def test_all_endings_that_pillow_opens_are_taken_and_the_others_counted(tmp_path, caplog):
    picture = Image.new("RGB", (16, 16), (200, 0, 0))
    endings = sorted(ending for ending in image_extensions() if Image.EXTENSION[ending] in Image.SAVE)
    assert {".jfif", ".jpe", ".ppm", ".jpg", ".mpo", ".tga", ".ico"} < {*endings}
    assert not {".eps", ".ps", ".mpg", ".h5", ".pdf"} & image_extensions()
    for ending in endings:
        mode = {".msp": "1", ".xbm": "1", ".blp": "P"}.get(ending, "RGB")
        picture.convert(mode).save(tmp_path / f"a.b{ending.upper()}")
    for name in ("a.heic", "b.HEIC", "c.jxl", "notes.txt", "README", "d.png.part", "film.mpg"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "lamamba-manifest.json").write_text("{}")
    source = open_source(tmp_path)
    assert [file.kind for file in check_files(source, 1)] == [""] * len(endings)
    assert source.left_out.counts == {
        ".heic": 2, ".jxl": 1, ".txt": 1, "without ending": 1, ".part": 1, ".mpg": 1}
    assert "2 .heic (" in caplog.text


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are bytes on Linux alone")
def test_odd_names_links_and_loops(tmp_path, caplog):
    """Names that are not UTF-8, with tabs and line ends; links in circles and to nothing; one name in two spellings."""
    write_images(tmp_path / "set" / "cafe\u0301", 1)
    write_images(tmp_path / "set" / "caf\u00e9", 2)
    odd = os.fsencode(tmp_path / "set" / "caf\u00e9") + b"/\xe9\t\n.png"
    os.rename(tmp_path / "set" / "caf\u00e9" / "001.png", odd)
    for name in (b"na\xefve", b"Tea", b"tea"):
        shutil.copytree(tmp_path / "set" / "cafe\u0301", os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + name))
    os.symlink(tmp_path / "set", tmp_path / "set" / "tea" / "up")
    os.symlink("self", tmp_path / "set" / "tea" / "self")
    os.symlink("nothing.png", tmp_path / "set" / "tea" / "gone.png")
    os.symlink(tmp_path / "set" / "Tea", tmp_path / "set" / "linked")
    source = open_source(tmp_path / "set")
    assert source.label_names == ("Tea", "cafe\u0301", "linked", r"na\xefve", "tea")
    names = [source.file(k) for k in range(len(source))]
    assert names == [
        "Tea/000.png", "cafe\u0301/000.png", "caf\u00e9/000.png", "caf\u00e9/\\xe9\\x09\\x0a.png", "linked/000.png",
        r"na\xefve/000.png", "tea/000.png",
    ]
    assert source.labels.tolist() == [0, 1, 1, 1, 2, 3, 4]
    assert source.left_out.counts == {"link to a folder above itself": 1, "link to nothing, or no file": 2}
    assert "'Tea' and 'tea' differ in upper and lower case alone" in caplog.text
    (tmp_path / "set" / "tea" / "000.png").write_bytes(b"")
    pickle.loads(pickle.dumps(source)).read(3)
    manifest = make_manifest(source, check_files(source, 1))
    manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == manifest
    assert excluded_files(source, tmp_path / "m.json") == (("tea/000.png",), None)
    os.truncate(odd, 0)
    images = Images(source, 8, max_bad_images=2, bad_files=tmp_path / "bad.tsv")
    images.read(range(7))
    assert read_bad_files(tmp_path / "bad.tsv") == {names[3]: "empty: 0 bytes", names[6]: "empty: 0 bytes"}


def test_deleted_images_keep_their_places_are_replaced_and_named(tmp_path):
    for name in ("a", "b", "c"):
        write_images(tmp_path / name, 2)
    images = Images(open_source(tmp_path), 8, max_bad_images=3)
    (tmp_path / "a" / "001.png").unlink()
    shutil.rmtree(tmp_path / "b")
    again = Images(open_source(tmp_path, images.source_files), 8, max_bad_images=3)
    assert (again.fingerprint, again.label_names) == (images.fingerprint, ("a", "b", "c"))
    for each in (images, again):
        assert each.read([1, 2, 4])[1].tolist() == [2, 2, 2]
        assert sorted(each.bad) == ["a/001.png", "b/000.png", "b/001.png"]       # threads meet them in any order
    with pytest.raises(ValueError, match=r"1 file cannot be read .*\(unreadable: No such file"):
        Images(open_source(tmp_path, images.source_files), 8).read([1])


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


def test_no_part_of_a_tar_is_left_out_in_silence(tmp_path):
    """Behind a damaged header, or behind the end of the first of tars that were joined."""
    pytest.importorskip("webdataset", reason="needs webdataset")
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{k}.png", b"x") for k in range(3)])
    whole = (tmp_path / "a.tar").read_bytes()
    assert len(open_source(tmp_path / "a.tar")) == 3
    (tmp_path / "a.tar").write_bytes(whole[:2048])                              # without an end, as some programs write
    assert len(open_source(tmp_path / "a.tar")) == 2
    for content, said in (
        (whole[:1100] + b"?" + whole[1101:], "byte 1,024 begins no file"), (whole[:2500], "byte 2,048 begins no file"),
        (whole + (tmp_path / "b.tar").read_bytes(), "more follows its end at byte 3,072"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.tar is damaged, .*{said}"):
            open_source(tmp_path / "a.tar")


def test_tars_beside_images_are_ambiguous(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    write_tar(tmp_path / "backup.tar", [("0.png", b"x")])
    (tmp_path / ".cache").mkdir()
    write_images(tmp_path / ".cache", 1)
    assert len(open_source(tmp_path)) == 1
    write_images(tmp_path / "cats", 2)
    with pytest.raises(ValueError, match=r"holds tars \(backup.tar\) and images beside them \(cats/000.png\)"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "backup.tar")) == 1


@pytest.mark.parametrize(("content", "said"), [
    (b"9" * 5000, "a.cls has 5,000 bytes, and a class is"), (b"a\nb", "a.cls holds 'a\\\\nb', and a class is"),
    (b"3\0", "a number or a word in one line")])
def test_class_files_that_hold_something_else_are_refused(tmp_path, content, said):
    pytest.importorskip("webdataset", reason="needs webdataset")
    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", content)])
    with pytest.raises(ValueError, match=rf"a\.tar is damaged.*{said}"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("headers", [
    {"GNU.sparse.map": "1,x"}, {"GNU.sparse.size": "zz"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png", "GNU.sparse.realsize": "9"}])
def test_tars_whose_headers_are_nonsense_are_named(tmp_path, headers):
    pytest.importorskip("webdataset", reason="needs webdataset")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.size, member.pax_headers = 1, headers
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        open_source(tmp_path / "a.tar")


def test_a_file_in_a_tar_that_is_larger_than_any_disk_is_named(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    write_tar(tmp_path / "a.tar", [("a.png", b"x")])
    header = bytearray((tmp_path / "a.tar").read_bytes())
    header[124:136] = b"\x80\0\0\0" + (2**62).to_bytes(8, "big")              # its size, and the sum of the header
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    (tmp_path / "a.tar").write_bytes(header)
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        open_source(tmp_path / "a.tar")


def test_patterns_of_tars_that_name_too_many_or_none(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    for ranges in ("{0..99999999}", "{0..9999}{0..9999}", "{0.." + "9" * 99 + "}"):
        with pytest.raises(ValueError, match="names more than 1,000,000 tars"):
            open_source(f"{tmp_path}/x{ranges}.tar")
    with pytest.raises(FileNotFoundError, match=r"names 1 tar \(patterns have braces, as in shards-\{000..099\}.tar\)"):
        open_source(f"{tmp_path}/*.tar")


def test_a_folder_of_any_name_is_a_folder(tmp_path):
    for name in ("photos.tar", "photos{1..3}"):
        write_images(tmp_path / name, 2)
        assert len(open_source(tmp_path / name)) == 2


def test_tars_of_one_folder_have_manifests_of_their_own(tmp_path):
    pytest.importorskip("webdataset", reason="needs webdataset")
    names = [str(tmp_path / name) for name in ("train-{0..1}.tar", "val.tar")]
    for name in ("train-0", "train-1", "val"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", b"x")])
    assert len({manifest_path(name) for name in (*names, str(tmp_path))}) == 3
    for name in names:
        source = open_source(name)
        make_manifest(source, check_files(source, 1)).save(manifest_path(name))
    assert excluded_files(open_source(names[0])) == (("train-0.tar/0.png", "train-1.tar/0.png"), None)
    assert excluded_files(open_source(names[1])) == (("val.tar/0.png",), None)
    manifest_path(names[1]).rename(tmp_path / "lamamba-manifest.json")          # as it was called before
    assert excluded_files(open_source(names[1])) == (("val.tar/0.png",), None)
    manifest_path(names[0]).unlink()
    assert excluded_files(open_source(names[0])) == ((), None)                  # that one is not of these


def test_the_manifest_of_a_saved_data_set_lies_in_its_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.chdir(tmp_path)
    rows = {"image": [{"bytes": b"x", "path": None}]}
    held = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    datasets.DatasetDict({"train": held, "test": held}).save_to_disk("splits")
    for name, file in (("splits", "lamamba-manifest.json"), ("datasets:splits@test", "test-lamamba-manifest.json")):
        source = open_source(name)
        assert manifest_path(source.name) == Path("splits") / file
        make_manifest(source, check_files(source, 1)).save(manifest_path(source.name))
        assert excluded_files(open_source(name))[0] == (source.file(0),)
    Path("splits/test-lamamba-manifest.json").rename("datasets-splits-test-lamamba-manifest.json")     # as once
    assert excluded_files(open_source("datasets:splits@test"))[0] == ("test/0",)
    assert manifest_path("datasets:user/set@test") == Path("datasets-user-set-test-lamamba-manifest.json")


def test_names_with_dots_and_names_that_come_twice_keep_their_own_class(tmp_path, caplog):
    pytest.importorskip("webdataset", reason="needs webdataset")
    picture = encoded(Image.new("RGB", (4, 4)), "PNG")
    samples = [
        ("./d.1/a.png", b"0"), ("photo.v2.png", b"1"), ("22.05.PNG", b"2"), ("b.left.png", None),
        ("b.right.png", None), ("b.cls", b"\xef\xbb\xbf3"), ("c.png", b"4"), ("c.mask.png", None), ("c.json", None),
        ("__MACOSX/._c.png", None), ("e.png", b"0"), ("e.png", b"1"), ("no image", None),
    ]
    files = []
    for name, label in samples:
        files.append((name, label if name.endswith(".cls") else picture))
        if label and not name.endswith(".cls"):
            files.append((name[:-4] + ".cls", label))
    write_tar(tmp_path / "a.tar", files)
    (tmp_path / "readme.md").write_text("not used")
    source = open_source(tmp_path)
    named = {source.file(k).removeprefix("a.tar/"): label for k, label in enumerate(source.labels.tolist())}
    assert named == {
        "./d.1/a.png": 0, "photo.v2.png": 1, "22.05.PNG": 2, "b.left.png": 3, "b.right.png": 3, "c.png": 4, "e.png": 0,
        "e.png#2": 1,
    }
    assert source.left_out.counts == {
        ".md": 1, ".json": 1, JUNK_REASON: 1, "without ending": 1, "further images of a sample": 1}
    assert "1 further images of a sample (c.mask.png)" in caplog.text
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.tar", tmp_path / "sub" / "a.tar")
    twice = open_source(f"{tmp_path}/{{.,sub}}/a.tar")
    assert len({twice.file(k) for k in range(len(twice))}) == 2 * len(source)


@pytest.mark.parametrize(("classes", "said"), [
    (["0", "1000000000"], "the class 1000000000 in 2 images"), (["1", "-1"], "the class -1 in 2 images"),
    (["9" * 90, "0"], "numbers are labels, and count the classes from 0"),
])
def test_classes_that_cannot_be_labels_are_refused_before_anything_is_allocated(classes, said):
    with pytest.raises(ValueError, match=said):
        number_classes("tars", classes)


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
    with pytest.raises(ValueError, match="'datasets:@train' names no data set"):
        open_source("datasets:@train")
    held.save_to_disk(tmp_path / "me@home")                                     # which is no split
    assert len(open_source(tmp_path / "me@home")) == 4
    for file in ("state.json", "dataset_info.json"):
        whole = (tmp_path / "saved" / file).read_bytes()
        for content in ("[]", "null", '{"_data_files": 3, "features": 3}'):
            (tmp_path / "saved" / file).write_text(content)
            with pytest.raises(RuntimeError, match="cannot be had: (Type|Attribute|Key)Error"):
                open_source(tmp_path / "saved")
        (tmp_path / "saved" / file).write_bytes(whole)


@pytest.mark.parametrize(("kind", "labels", "names", "expected"), [
    ("int64", [2, 0, 2, 1], ("0", "1", "2"), {0: 2, 1: 0, 2: 2, 3: 1}),
    ("string", ["dog", "cat", "dog", None], ("cat", "dog"), {0: 1, 1: 0, 2: 1}),
    ("string", ["caf\u00e9", "cafe\u0301", "", "b"], ("b", "cafe\u0301"), {0: 1, 1: 1, 3: 0}),
    ("bool", [True, False, True, None], ("0", "1"), {0: 1, 1: 0, 2: 1}),
    (["a", "b"], [0, 1, None, -1], ("a", "b"), {0: 0, 1: 1}),
    ("float32", [0.5, 1.0, None, 2.0], (), {0: 0, 1: 0, 2: 0, 3: 0}),
])
def test_columns_of_words_and_numbers_are_classes_and_empty_rows_are_counted(
    tmp_path, kind, labels, names, expected, caplog
):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    content = encoded(Image.new("RGB", (4, 4)), "PNG")
    feature = datasets.ClassLabel(names=kind) if isinstance(kind, list) else datasets.Value(kind)
    features = datasets.Features({"image": datasets.Image(), "label": feature, "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": content, "path": None}, None] * 2, "label": labels, "caption": ["x"] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    with caplog.at_level("INFO"):
        source = open_source(tmp_path)
    assert source.label_names == names
    assert dict(zip(map(source.file, range(len(source))), source.labels.tolist(), strict=True)) == {
        f"train/{row}": label for row, label in expected.items()}
    assert source.left_out.counts.total() == 4 - len(expected)
    assert "not used: " in caplog.text
    assert {file.number for file in check_files(source, 1) if file.kind == "empty"} == {
        k for k, row in enumerate(expected) if row % 2}


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
