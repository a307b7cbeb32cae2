"""Folders of images, the digits, and what a codec makes of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lamamba.data.codec import LatentDecoder, PixelCodec
from lamamba.data.digits import Digits
from lamamba.data.images import ImageFolder, centre_crop


def write_images(folder, count, size=(20, 30), mode="RGB", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")


def test_subfolders_are_classes(tmp_path):
    write_images(tmp_path / "cat", 3)
    write_images(tmp_path / "ant", 2, mode="L")
    images = ImageFolder(tmp_path, image_size=16)
    assert images.label_names == ("ant", "cat")
    pixels, labels = images.read([0, 1, 2, 4])
    assert pixels.shape == (4, 3, 16, 16)
    assert pixels.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    again, _ = images.read([4])
    assert np.array_equal(pixels[3], again[0])


def test_a_flat_folder_has_no_classes(tmp_path):
    write_images(tmp_path, 3)
    images = ImageFolder(tmp_path, image_size=8, channels=1)
    assert images.label_names == ()
    assert images.read([0, 2])[0].shape == (2, 1, 8, 8)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path, 16)
    write_images(tmp_path, 1)
    write_images(tmp_path / "cat", 1)
    with pytest.raises(ValueError, match="1 images beside 1 subfolders"):
        ImageFolder(tmp_path, 16)


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "000.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    (tmp_path / "zzz.jpg").write_text("hello")
    images = ImageFolder(tmp_path, 16)
    for index, name in ((0, "000.png"), (2, "zzz.jpg")):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            images.read([index])


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (33, 200), (16, 16), (10, 12)])
def test_centre_crop_is_square(size):
    assert centre_crop(Image.new("RGB", size), 16).size == (16, 16)


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
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        Digits(12)


def test_pixels_come_back_unchanged_and_mirrored_on_request():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, axis=0)
    codec = PixelCodec()
    x0 = codec.encode(images, mirror=np.array([False, True]))
    assert (float(x0.min()), float(x0.max())) == (-1, 1)
    back = codec.decode(x0)[..., 0]
    assert np.array_equal(back[0], images[0, 0])
    assert np.array_equal(back[1], images[0, 0, :, ::-1])
    assert codec.decode(torch.full((1, 1, 1, 1), 3.0)).item() == 255


def test_latents_go_through_any_saved_autoencoder(tmp_path):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
    )
    autoencoder.save_pretrained(tmp_path)
    latents = torch.randn(3, 4, 8, 8)
    pictures = LatentDecoder(tmp_path, scale=0.5).decode(latents)
    assert pictures.shape == (3, 16, 16, 3)
    with torch.no_grad():
        expected = PixelCodec().decode(autoencoder.eval().decode(latents / 0.5).sample)
    assert np.abs(pictures.astype(int) - expected.astype(int)).max() <= 1
