"""One opener for every kind of model: run, checkpoint, saved network, exported pipeline, the package's own."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import lamamba
from lamamba import LaMambaPipeline, LaMambaUNet
from lamamba.data.codec import CodecConfig
from lamamba.pretrained import shipped_model
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import fingerprint, list_averages, open_network
from lamamba.sampling import generate
from lamamba.utils.files import write_json
from tests.autoencoders import make_kl
from tests.files import write_manifest
from tests.networks import grey_network, largest_difference, save_model

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Every kind of place, and the seed of the network that it is opened to."""
    root = tmp_path_factory.mktemp("places")
    metadata = ModelMetadata(objective="flow", image_size=8, label_names=NAMES, guidance=1.5)
    checkpoint = root / "run" / "checkpoints" / "step_00000010"
    for name, seed in (("ema", 1), ("ema_0.9", 2), ("model", 3)):
        grey_network(seed).save_pretrained(checkpoint / name)
    metadata.save(checkpoint / "sampling.json")
    write_json(checkpoint / "state.json", {"step": 10, "ema_decays": [0.99, 0.9]})
    write_manifest(checkpoint)
    save_model(root / "saved", grey_network(4), label_names=NAMES, guidance=1.5)
    grey_network(5).save_pretrained(root / "from_python")
    pipe = LaMambaPipeline.from_pretrained(root / "saved")
    pipe.save_pretrained(root / "pipeline")
    return root


CHECKPOINT = "run/checkpoints/step_00000010"


@pytest.mark.parametrize(("place", "ema", "seed"), [
    ("run", None, 1), ("run", 0.99, 1), ("run", 0.9, 2), ("run", "none", 3), (CHECKPOINT, None, 1),
    (CHECKPOINT, 0.9, 2), ("saved", None, 4), ("from_python", None, 5), ("pipeline", None, 4),
])
def test_every_kind_of_place_is_opened(places, place, ema, seed):
    model = lamamba.open_model(places / place, ema=ema)
    assert model.sha256 == fingerprint(grey_network(seed))
    assert model.name == str(places / place)
    assert (model.metadata.objective, model.metadata.image_size, model.decoder) == ("flow", 8, None)
    named = place != "from_python"
    assert model.metadata.label_names == (NAMES if named else ())
    assert model.metadata.guidance == (1.5 if named else None)
    same, metadata = open_network(places / place, ema)
    assert (fingerprint(same), metadata) == (model.sha256, model.metadata)
    pipe = LaMambaPipeline.from_pretrained(places / place, **({} if ema is None else {"ema": ema}))
    assert pipe.config.guidance_scale == model.metadata.guidance
    seeds = [torch.Generator().manual_seed(k) for k in (3, 4)]
    pictures = pipe([1, 2], num_inference_steps=2, generator=seeds).images
    scale = 1.5 if named else 2.0
    images = generate(model.network, [1, 2], [3, 4], num_steps=2, guidance=scale)[..., 0]
    assert largest_difference([np.asarray(picture) for picture in pictures], images) <= 1


@pytest.mark.parametrize("path", [None, "shipped"])
def test_the_model_of_the_package_has_a_name(path):
    model = lamamba.open_model(path)
    assert model.name == "shipped"
    assert model.sha256 == fingerprint(LaMambaUNet.from_pretrained(shipped_model()))
    assert (model.metadata.guidance, len(model.metadata.label_names)) == (1.75, 10)
    assert LaMambaPipeline.from_pretrained("shipped").config.guidance_scale == 1.75


def test_what_a_checkpoint_keeps_is_listed(places):
    assert [*list_averages(places / CHECKPOINT)] == [0.99, 0.9, "none"]
    assert list_averages(places / "saved") == {}


@pytest.mark.parametrize(("place", "ema", "error", "said"), [
    ("run", 0.5, ValueError, "has no average 0.5; it has 0.99, 0.9, none"),
    ("saved", 0.9, ValueError, "no average can be chosen"), ("pipeline", 0.9, ValueError, "no average can be chosen"),
    ("nowhere", None, FileNotFoundError, "does not exist"), ("empty", None, FileNotFoundError, "holds no network"),
    ("", None, FileNotFoundError, "no config.json in it; give .*from_python or .*run or .*saved"),
    ("new_run", None, FileNotFoundError, "without a checkpoint yet"),
    ("model.pt", None, ValueError, "lamamba convert .*model.pt DIR"),
])
def test_what_is_no_model_is_refused(places, place, ema, error, said):
    (places / "empty").mkdir(exist_ok=True)
    (places / "new_run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (places / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(error, match=said):
        lamamba.open_model(places / place, ema=ema)


def test_an_autoencoder_is_refused_for_pixels(places):
    with pytest.raises(ValueError, match="this model makes pixels"):
        lamamba.open_model(places / "saved", autoencoder="vae")


@pytest.mark.parametrize("place", ["run", CHECKPOINT, "pipeline"])
def test_the_networks_own_loader_says_what_opens_a_run(places, place):
    with pytest.raises(OSError, match=r"lamamba\.open_model\(.*\)\.network opens it"):
        LaMambaUNet.from_pretrained(places / place)


def test_without_metadata_four_channels_are_taken_for_latents(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lamamba")
    grey_network(in_channels=4).save_pretrained(tmp_path / "latents")
    _, metadata = open_network(tmp_path / "latents")
    assert (metadata.codec, metadata.scale, metadata.image_size) == ("latents", 0.18215, 64)
    assert "taken for a model of latents of Stable Diffusion, scale 0.18215" in caplog.text
    with pytest.raises(ValueError, match="name the autoencoder"):
        lamamba.open_model(tmp_path / "latents")
    vae = make_kl()
    vae.save_pretrained(tmp_path / "vae")
    model = lamamba.open_model(tmp_path / "latents", autoencoder=str(tmp_path / "vae"))
    expected = CodecConfig.of_config(vae.config)
    assert (model.metadata.scale, model.metadata.shift) == (expected.scale, expected.shift)
    assert model.decoder.config.scale == expected.scale
    pipe = LaMambaPipeline.from_pretrained(tmp_path / "latents", autoencoder=str(tmp_path / "vae"))
    assert pipe.config.codec is None                                            # as the autoencoder's own
    side = model.metadata.image_size
    assert model.decoder.decode(torch.zeros(1, 4, 8, 8)).shape == (1, side, side, 3)
