"""Nothing that is not finite becomes a picture: not by sampling, not by an autoencoder, not while training."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import lamamba
from lamamba import LaMambaPipeline
from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import LatentDecoder, to_uint8
from lamamba.diffusion.denoise import make_scheduler
from lamamba.evaluation.callbacks import SampleGrid
from lamamba.options.training import SampleGridOptions
from lamamba.sampling import generate
from tests.autoencoders import make_kl
from tests.networks import random_network, save_model, small_config


def broken_network(after: int = 0, **changes):
    """A network whose output is NaN from some call on."""
    network = random_network(small_config(width=8, depths=(1, 1, 1, 1), objective="flow", **changes))
    calls = iter(range(1000))
    network.head.register_forward_hook(lambda *_: _[2] * (torch.nan if next(calls) >= after else 1))
    return network


def overflowing(**changes):
    """An autoencoder that overflows in float16, and not in float32."""
    vae = make_kl(**changes)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e5)
    return vae


@pytest.mark.parametrize(("after", "step"), [(0, 1), (2, 3)])
def test_the_step_that_went_wrong_is_named(after, step):
    with pytest.raises(FloatingPointError, match=f"became NaN or infinite in step {step} of 4"):
        generate(broken_network(after, in_channels=1), [0], [0], num_steps=4)
    pipe = LaMambaPipeline(broken_network(after, in_channels=1), None, make_scheduler("flow-euler", "flow"))
    for kind in ("pil", "np", "pt", "latent"):
        with pytest.raises(FloatingPointError, match="became NaN or infinite in step"):
            pipe(0, num_inference_steps=4, output_type=kind)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_not_finite_are_no_picture(value):
    pixels = torch.zeros(3, 1, 2, 2)
    pixels[1, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="1 of 3 pictures"):
        to_uint8(pixels)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_vae_that_overflows_makes_no_picture_or_is_upcast(output_type):
    network = random_network(small_config(width=8, depths=(1, 1, 1, 1), objective="flow"))
    for upcast in (False, True):
        vae = overflowing(force_upcast=upcast).to(torch.float16)
        pipe = LaMambaPipeline(network, vae, make_scheduler("flow-euler", "flow"))
        if upcast:
            assert len(pipe(0, num_inference_steps=1, output_type=output_type).images) == 1
            assert vae.dtype == torch.float16
        else:
            with pytest.raises(FloatingPointError, match=r"the vae in torch\.float16 made NaN"):
                pipe(0, num_inference_steps=1, output_type=output_type)


def test_an_autoencoder_in_half_precision(tmp_path):
    overflowing(force_upcast=False).save_pretrained(tmp_path / "plain")
    overflowing(force_upcast=True).save_pretrained(tmp_path / "upcast")
    decoder = LatentDecoder(Autoencoder(tmp_path / "plain", dtype=torch.float16))
    with pytest.raises(FloatingPointError, match=r"decodes to NaN or infinities in torch\.float16"):
        decoder.decode(torch.randn(1, 4, 4, 4))
    autoencoder = Autoencoder(tmp_path / "upcast", dtype=torch.float16)
    assert autoencoder.dtype == torch.float32
    assert LatentDecoder(autoencoder).decode(torch.randn(1, 4, 4, 4)).dtype == np.uint8


def test_commands_and_folders_make_none(tmp_path, monkeypatch):
    network = random_network(small_config(width=8, depths=(1, 1, 1, 1), objective="flow", in_channels=1))
    with torch.no_grad():
        network.head.linear.bias.fill_(3e38)
    options = dict(model=save_model(tmp_path / "m", network), guidance=9.0)
    with pytest.raises(FloatingPointError, match="became NaN or infinite"):
        lamamba.sample(lamamba.SampleOptions(**options, out=tmp_path / "a.png", num=1), progress=None)
    many = lamamba.SampleFolderOptions(**options, out=tmp_path / "many", num=2, balanced=True)
    with pytest.raises(FloatingPointError, match="became NaN or infinite"):
        lamamba.sample_folder(many, progress=None)
    assert not list(tmp_path.rglob("*.png"))


def test_training_goes_on_without_a_picture(tmp_path, caplog):
    class State:
        step, steps = 5, 10

        def whole_ema(self):
            return broken_network(in_channels=1)

    with caplog.at_level(logging.WARNING):
        SampleGrid(SampleGridOptions(every=5, steps=2, per_class=1), tmp_path, ("a", "b", "c"))(State())
    assert "no samples of this step: sampling became NaN" in caplog.text
    assert not list(tmp_path.iterdir())
