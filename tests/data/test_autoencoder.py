"""Autoencoders: loaded from safetensors alone, identified by a hash, moments and decoding of each class."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig, LatentDecoder, to_uint8
from tests.autoencoders import MAKERS, make_kl, make_tiny
from tests.networks import largest_difference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoders")
    for name, make in MAKERS.items():
        make().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", MAKERS)
def test_moments_are_the_autoencoders_own(saved, kind):
    ours, theirs = Autoencoder(saved / kind), MAKERS[kind]()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = ours.moments(pixels)
    with torch.no_grad():
        encoded = theirs.encode(pixels)
    if kind == "AutoencoderKL":
        torch.testing.assert_close(mean, encoded.latent_dist.mean)
        torch.testing.assert_close(std, encoded.latent_dist.std)
    else:
        assert std is None
        torch.testing.assert_close(mean, encoded.latent if kind == "AutoencoderDC" else encoded.latents)
    assert ours.latent_shape(16) == (4, 8, 8)
    assert not mean.requires_grad


@pytest.mark.parametrize("kind", MAKERS)
def test_latents_are_decoded_by_their_autoencoders_scale_and_shift(saved, kind):
    theirs = MAKERS[kind]()
    latents = torch.randn(3, 4, 8, 8)
    decoder = LatentDecoder(saved / kind)
    scale, shift = {"AutoencoderKL": (0.5, 0.25), "AutoencoderTiny": (1.0, 0.0), "AutoencoderDC": (0.4, 0.0)}[kind]
    assert (decoder.config.scale, decoder.config.shift) == (scale, shift)
    pictures = decoder.decode((latents - shift) * scale)
    assert pictures.shape == (3, 16, 16, 3)
    with torch.no_grad():
        expected = to_uint8(theirs.decode(latents).sample)
    assert largest_difference(pictures, expected) <= 1


def test_scaling_by_channel_and_back(tmp_path):
    make_kl(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0]).save_pretrained(tmp_path)
    facts = CodecConfig.of(Autoencoder(tmp_path))
    latents = torch.randn(2, 4, 3, 3)
    x0 = facts.to_x0(latents)
    torch.testing.assert_close(x0[:, 2], (latents[:, 2] - 3) / 4 * 0.5)
    torch.testing.assert_close(facts.to_latents(x0), latents)


def test_the_hash_is_of_weights_and_configuration_not_of_the_name(saved, tmp_path):
    first = Autoencoder(saved / "AutoencoderKL")
    shutil.copytree(saved / "AutoencoderKL", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config |= {"_diffusers_version": "9.9", "sample_size": 999}
    config.pop("mid_block_add_attention")                                       # as an older diffusers writes it
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert Autoencoder(tmp_path / "copy").sha256 == first.sha256
    others = [make_kl(seed=1), make_kl(scaling_factor=0.6), make_tiny()]
    for number, other in enumerate(others):
        other.save_pretrained(tmp_path / str(number))
    hashes = {Autoencoder(tmp_path / str(number)).sha256 for number in range(len(others))}
    assert len(hashes | {first.sha256}) == 4


def test_a_pipelines_vae_is_found(saved, tmp_path):
    shutil.copytree(saved / "AutoencoderKL", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert Autoencoder(tmp_path).sha256 == Autoencoder(saved / "AutoencoderKL").sha256


def test_damaged_and_foreign_autoencoders_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no autoencoder './nowhere'"):
        Autoencoder("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Autoencoder(tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(saved / "AutoencoderTiny", cut)
    (weights,) = cut.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"cut.diffusion_pytorch_model.safetensors is damaged"):
        Autoencoder(cut)
    config = json.loads((cut / "config.json").read_text())
    weights.write_bytes(content)
    (cut / "config.json").write_text(json.dumps({**config, "num_decoder_blocks": [2, 1]}))
    with pytest.raises(ValueError, match="do not fit its configuration .missing: "):
        Autoencoder(cut)
    (cut / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel, not one of AutoencoderKL"):
        Autoencoder(cut)
