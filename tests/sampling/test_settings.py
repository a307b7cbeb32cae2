"""A picture says how it was made, and refuses to when it cannot."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image, PngImagePlugin

from lamamba import LaMambaUNet
from lamamba.diffusion.guidance import Guidance
from lamamba.runs.model import fingerprint
from lamamba.sampling.settings import ImageMetadata, Interpolated, Settings, png_text, read_image_metadata
from tests.networks import random_network, two_blocks

SETTINGS = Settings(
    model="runs/digits", model_sha256="abc", sampler="ddim", steps=12, height=16, width=24,
    guidance=Guidance(3.0, "first-three", (0.1, 0.8), 0.5), autoguidance="runs/early", autoguidance_sha256="def",
)
FACTS = ImageMetadata(
    settings=SETTINGS, seeds=(3, Interpolated(3, 7, 0.25)), labels=(Interpolated(0, 2, 1 / 3), 1), columns=2,
    row_names=("größer",), batch_size=5,
)


def test_there_and_back_through_a_png(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", pnginfo=png_text(FACTS))
    assert read_image_metadata(tmp_path / "a.png") == FACTS
    values = json.loads(Image.open(tmp_path / "a.png").text["lamamba"])         # readable without us
    assert values["settings"]["guidance"] == {
        "scale": 3.0, "channels": "first-three", "interval": [0.1, 0.8], "rescale": 0.5}
    assert (values["version"], values["seeds"]) == (1, [3, [3, 7, 0.25]])


@pytest.mark.parametrize(("text", "said"), [
    (None, "a.png holds no settings"),
    ("{", "settings in .*a.png cannot be read"),
    (json.dumps({"version": 99}), "version 99, this lamamba reads up to 1: upgrade it"),
    (json.dumps({"version": 1}), "a.png cannot be read: settings is missing"),
    (json.dumps(FACTS.to_dict()).replace("sampler", "smapler"), "did you mean 'settings.sampler'"),
    ("[]", "cannot be read"),
    (json.dumps({**FACTS.to_dict(), "labels": [1]}), "do not fit together"),
])
def test_pictures_without_good_settings_are_refused(tmp_path, text, said):
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("lamamba", text)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=said):
        read_image_metadata(tmp_path / "a.png")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_image_metadata(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image_metadata(tmp_path / "b.png")


def test_a_networks_fingerprint_is_of_what_it_computes(tmp_path):
    model = random_network(two_blocks(width=8))
    before = fingerprint(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    for name in ("whole", "split"):
        assert fingerprint(LaMambaUNet.from_pretrained(tmp_path / name)) == before
    model.set_grid((12, 8))                                                     # no part of it
    assert fingerprint(model) == before
    with torch.no_grad():
        model.head.linear.bias[0] += 1e-3
    assert fingerprint(model) != before
    assert fingerprint(random_network(two_blocks(width=8, objective="v"))) != before
