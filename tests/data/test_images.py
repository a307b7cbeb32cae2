"""Folders of images, decoding and crops, the digits, pixels and x0."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lamamba.data.codec import to_pixels, to_uint8
from lamamba.data.digits import Digits
from lamamba.data.image_files import image_formats
from lamamba.data.images import BadImage, Images, centre_crop, decode, random_crop
from lamamba.data.sources import FolderSource

BAD = {
    "empty.png": "empty", "text.jpg": "not an image", "header.png": "truncated", "half.png": "truncated",
    "half.jpg": "truncated", "magic.jpg": "truncated", "pixel.gif": "too small", "line.png": "too narrow",
    "bomb.png": "decompression bomb", "float.tif": "32-bit",
}


def write_odd_files(folder):
    """A bad file of every kind, and three that only need a conversion."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    for suffix in ("png", "jpg"):
        picture.save(folder / f"whole.{suffix}")
        content = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"whole.{suffix}").unlink()
        (folder / f"half.{suffix}").write_bytes(content[: len(content) // 2])
        if suffix == "png":
            (folder / "header.png").write_bytes(content[:20])
        else:
            (folder / "magic.jpg").write_bytes(content[:30])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this was a page that said 404")
    Image.new("P", (1, 1)).save(folder / "pixel.gif")
    Image.new("L", (400, 3)).save(folder / "line.png")
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    Image.fromarray(rng.random((20, 20), dtype=np.float32)).save(folder / "float.tif")
    Image.new("CMYK", (20, 20), (255, 0, 0, 0)).save(folder / "cmyk.jpg", quality=95)
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(folder / "grey16.png")
    (folder / "rgb16.png").write_bytes(_png_of_16_bits(rng.integers(0, 65536, (12, 12, 3)).astype(">u2")))


def _png_of_16_bits(pixels):
    """Pillow writes none in colour."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def write_images(folder, count, size=(20, 30), mode="RGB", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")


def test_subfolders_are_classes(tmp_path):
    write_images(tmp_path / "cat", 3)
    write_images(tmp_path / "ant", 2, mode="L")
    images = Images(FolderSource(tmp_path), image_size=16)
    assert images.label_names == ("ant", "cat")
    pixels, labels = images.read([0, 1, 2, 4])
    assert pixels.shape == (4, 3, 16, 16)
    assert pixels.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    again, _ = images.read([4])
    assert np.array_equal(pixels[3], again[0])


def test_a_flat_folder_has_no_classes(tmp_path):
    write_images(tmp_path, 3)
    images = Images(FolderSource(tmp_path), image_size=8, channels=1)
    assert images.label_names == ()
    assert images.read([0, 2])[0].shape == (2, 1, 8, 8)


CONVERTED = {"cmyk.jpg": "CMYK", "grey16.png": "16-bit", "rgb16.png": "16-bit"}


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    write_odd_files(folder)
    return folder


@pytest.mark.parametrize(("file", "kind"), BAD.items())
def test_what_makes_a_file_bad(odd_files, file, kind):
    with pytest.raises(BadImage) as caught:
        decode((odd_files / file).read_bytes())
    assert caught.value.kind == kind, caught.value


def test_odd_files_that_are_good_after_a_conversion(odd_files):
    for file, note in CONVERTED.items():
        image, conversion = decode((odd_files / file).read_bytes())
        assert (image.mode, conversion) == ("RGB", note)
    grey, _ = decode((odd_files / "grey16.png").read_bytes(), channels=1)
    assert np.array_equal(np.asarray(grey)[0, :3], [0, 1, 2])                   # v / 257, not cut off at 255
    assert np.asarray(grey).max() == 255
    cyan, _ = decode((odd_files / "cmyk.jpg").read_bytes())
    assert np.abs(np.asarray(cyan)[5, 5].astype(int) - [0, 255, 255]).max() <= 3


def encoded(image, kind, **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


@pytest.mark.parametrize(("bits", "white"), [(16, 65535), (16, 0), (12, 65535)])
def test_grey_tiffs_of_12_bits_and_with_white_at_0(bits, white):
    greys = np.arange(0, 256, 17)
    levels = abs(greys * 257 - (65535 - white)).astype("<u2") >> (16 - bits)
    packed = levels.tobytes()
    if bits == 12:                                                              # two pixels in three bytes
        packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in levels.reshape(-1, 2)) + bytes(8)
    content = encoded(Image.frombytes("I;16", (8, 2), packed), "TIFF")
    for tag, old, new in ((258, 16, bits), (262, 1, int(white > 0))):
        content = content.replace(struct.pack("<HHII", tag, 3, 1, old), struct.pack("<HHII", tag, 3, 1, new))
    image, note = decode(content, channels=1)
    assert (np.asarray(image).ravel().tolist(), note) == (greys.tolist(), "16-bit")


def transparent_images():
    """Files whose left half is transparent, with two hidden colours, and black beside it."""
    def halves(mode, hidden, seen):
        image = Image.new(mode, (8, 4), seen)
        image.paste(hidden, (0, 0, 4, 4))
        return image

    for k, grey in enumerate((0, 90)):
        palette, colours = halves("P", 1, 2), halves("RGBA", (grey, 200, 20, 0), (0, 0, 0, 255))
        palette.putpalette([9, 9, 9, grey, 200, 20, 0, 0, 0])
        yield f"RGBA {k}", encoded(colours, "PNG")
        yield f"LA {k}", encoded(halves("LA", (grey, 0), (0, 255)), "PNG")
        yield f"P {k}", encoded(palette, "PNG", transparency=1)
        yield f"GIF {k}", encoded(palette, "GIF", transparency=1)
        yield f"RGB {k}", encoded(halves("RGB", (grey, 200, 20), 0), "PNG", transparency=(grey, 200, 20))
        yield f"WebP {k}", encoded(colours, "WEBP", lossless=True, exact=True)
        sixteen = np.zeros((4, 8), np.uint16)
        sixteen[:, :4] = 700 + grey
        content = encoded(Image.fromarray(sixteen), "PNG")
        chunk = b"tRNS" + struct.pack(">H", 700 + grey)
        chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
        yield f"16-bit {k}", content[:33] + chunk + content[33:]


@pytest.mark.parametrize(("name", "content"), [pytest.param(*each, id=each[0]) for each in transparent_images()])
@pytest.mark.parametrize("channels", [1, 3, None])
def test_transparent_images_lie_on_white(name, content, channels):
    image, note = decode(content, channels)
    assert note == ("16-bit" if name.startswith("16") else "transparent")
    assert (np.asarray(image)[:, :4] == 255).all(), np.asarray(image)[0, 0]
    assert not np.asarray(image)[:, 4:].any()
    assert channels is None or len(image.getbands()) == channels


def test_half_transparent_and_opaque_pixels():
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    colours[..., 3] = 255
    image, note = decode(encoded(Image.fromarray(colours), "PNG"))
    assert note == ""
    assert np.array_equal(np.asarray(image), colours[..., :3])                  # to the bit
    colours[..., 3] = 51
    image, _ = decode(encoded(Image.fromarray(colours), "PNG"))
    assert np.abs(np.asarray(image) - (0.2 * colours[..., :3] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_exif_says(kind, orientation):
    """0 and 9 mean nothing."""
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image, note = decode(content)
    assert (image.size, note) == (expected.size, "")
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    damaged = encoded(picture, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + bytes([orientation]))
    assert np.array_equal(np.asarray(decode(damaged)[0]), np.asarray(picture))


def test_whatever_the_bytes_a_file_is_an_image_or_bad():
    """Every format that Pillow writes here, with bits turned and ends cut off."""
    rng, picture, kinds = random.Random(0), Image.effect_noise((20, 16), 90), 0
    for kind in sorted(Image.SAVE.keys() & set(image_formats()) - {"ICNS", "SPIDER"}):     # 1024 pixels wide; 32-bit
        for mode in ("RGB", "RGBA", "P", "L", "CMYK", "I;16"):
            try:
                content = encoded(picture.convert("RGBA" if mode == "RGBA" else "L").convert(mode), kind)
            except (OSError, KeyError, ValueError, SystemError, struct.error):  # not for this mode
                continue
            kinds += 1
            assert decode(content)[0].mode == "RGB"
            for _ in range(4):
                damaged = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)
                for _ in range(min(len(damaged), rng.choice([1, 3, 10]))):
                    damaged[rng.randrange(min(len(damaged), rng.choice([64, 4000])))] ^= 1 << rng.randrange(8)
                with contextlib.suppress(BadImage):
                    assert decode(bytes(damaged))[0].mode == "RGB"
    assert kinds > 40


def test_the_first_frame_of_an_animation_counts_and_nothing_starts_programs():
    frames = [Image.new("P", (4, 4), k) for k in range(3)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0].convert("RGB"), kind, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(decode(content)[0])[0, 0].tolist() == [10, 20, 30]
    with pytest.raises(BadImage, match="not an image"):                         # Pillow would start Ghostscript
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_bad_files_are_replaced_by_the_next_good_one_and_counted(tmp_path):
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 3)
    (tmp_path / "a" / "002.png").write_bytes(b"")
    (tmp_path / "b" / "002.png").write_bytes(b"no")
    images = Images(FolderSource(tmp_path), 16, max_bad_images=2)
    pixels, labels = images.read([2, 3, 5, 0, 2])
    assert labels.tolist() == [1, 1, 0, 0, 1]                                   # its own label, not the missing one's
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[2], pixels[3])                                 # after the last comes the first
    assert sorted(images.bad) == ["a/002.png", "b/002.png"]                     # met by several threads at once
    strict = Images(FolderSource(tmp_path), 16, max_bad_images=1)
    strict.read([0, 1, 2])
    with pytest.raises(ValueError, match=r"2 files cannot.*1 are allowed: a/002.png \(empty.*b/002.png \(not an image"):
        strict.read([5])
    shared = [Images(FolderSource(tmp_path), 16, max_bad_images=1, bad_files=tmp_path / "bad.tsv") for _ in range(2)]
    shared[0].read([2])
    with pytest.raises(ValueError, match=r"2 files cannot.*a/002.png \(empty.*b/002.png"):
        shared[1].read([5])                                                     # counted together
    listed = [line.split("\t")[0] for line in (tmp_path / "bad.tsv").read_text().splitlines()]
    assert listed == ["a/002.png", "b/002.png"]
    known = Images(FolderSource(tmp_path), 16, excluded=["a/002.png", "b/002.png"])
    assert (len(known), known.labels.tolist()) == (4, [0, 0, 1, 1])
    assert known.files([1, 2]) == ["a/001.png", "b/000.png"]
    assert known.fingerprint != strict.fingerprint


def test_an_image_set_survives_a_fork(tmp_path):
    """Threads do not survive it: a worker of a data loader starts its own."""
    write_images(tmp_path, 8)
    images = Images(FolderSource(tmp_path), 16)
    expected, _ = images.read(range(8))
    images._cache = None
    class Batches:
        def __getitem__(self, batch):
            return images.read(range(4 * batch, 4 * batch + 4))[0]
        def __len__(self):
            return 2
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert np.array_equal(np.concatenate([np.asarray(batch) for batch in loader]), expected)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Images(FolderSource(tmp_path / "nowhere"), 16)
    with pytest.raises(ValueError, match="holds no images"):
        Images(FolderSource(tmp_path), 16)
    write_images(tmp_path, 1)
    write_images(tmp_path / "cat", 1)
    with pytest.raises(ValueError, match="1 images beside 1 subfolders"):
        Images(FolderSource(tmp_path), 16)


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "000.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    (tmp_path / "zzz.jpg").write_text("hello")
    images = Images(FolderSource(tmp_path), 16)
    for index, name in ((0, "000.png"), (2, "zzz.jpg")):
        with pytest.raises(ValueError, match=rf"cannot be read.*: .*{name} \("):
            images.read([index])


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (33, 200), (16, 16), (10, 12)])
def test_centre_crop_is_square(size):
    assert centre_crop(Image.new("RGB", size), 16).size == (16, 16)


def test_centre_crop_halves_by_box_and_ends_bicubic():
    """Step by step: 300 x 210 to 150 x 105 to 75 x 52 (box), the short side to 32 (bicubic), then the cut."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (210, 300, 3), dtype=np.uint8))
    step = image.resize((150, 105), Image.Resampling.BOX).resize((75, 52), Image.Resampling.BOX)
    step = step.resize((46, 32), Image.Resampling.BICUBIC)                      # 75 * 32 / 52 = 46.15
    assert np.array_equal(np.asarray(centre_crop(image, 32)), np.asarray(step)[:, 7:39])


def test_random_crop_shows_80_to_100_percent():
    """Of an image whose pixels are their column."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    shown = {}
    for how_much in (0.0, 0.5, 0.9999):
        for left in (0.0, 0.9999):
            crop = random_crop(image, 64, [how_much, 0.5, left])
            assert crop.size == (64, 64)
            row = np.asarray(crop)[0].astype(int)
            shown[how_much, left] = (row[0], row[-1])
    assert shown[0.0, 0.0] == shown[0.0, 0.9999]                                # all of it: nowhere to move
    assert shown[0.0, 0.0][1] - shown[0.0, 0.0][0] > 245
    assert 195 < shown[0.9999, 0.0][1] - shown[0.9999, 0.0][0] < 206            # 64 of 80 pixels
    assert shown[0.9999, 0.0][0] < 5
    assert shown[0.9999, 0.9999][1] > 250


def test_random_crops_are_a_function_of_their_numbers(tmp_path):
    write_images(tmp_path, 2, size=(40, 50))
    images = Images(FolderSource(tmp_path), 16, crop="random")
    draws = np.array([[0.9, 0.1, 0.2], [0.9, 0.8, 0.7]])
    first, _ = images.read([0, 0], draws)
    assert not np.array_equal(first[0], first[1])
    assert np.array_equal(images.read([0], draws[1:])[0][0], first[1])
    with pytest.raises(ValueError, match="three random numbers"):
        images.read([0])


def test_centre_crop_takes_the_middle():
    pixels = np.zeros((16, 48), dtype=np.uint8)
    pixels[:, 16:32] = 200
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 16)) == 200).all()


def test_digits_are_the_real_ones():
    digits = Digits()
    assert len(digits) == 1797
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    large = Digits(16)
    assert np.array_equal(large.images[:, :, ::2, 1::2], digits.images)
    assert np.array_equal(large.read([5, 3])[0], large.images[[5, 3]])
    assert Digits(4096).read([0])[0].shape == (1, 1, 4096, 4096)                # one at a time: all are 30 GB
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        Digits(12)


def test_pixels_come_back_unchanged_and_mirrored_on_request():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, axis=0)
    x0, decode = to_pixels(images, mirror=np.array([False, True])), to_uint8
    assert (float(x0.min()), float(x0.max())) == (-1, 1)
    back = decode(x0)[..., 0]
    assert np.array_equal(back[0], images[0, 0])
    assert np.array_equal(back[1], images[0, 0, :, ::-1])
    assert decode(torch.full((1, 1, 1, 1), 3.0)).item() == 255

