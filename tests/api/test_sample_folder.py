"""lamamba.sample_folder: a folder of images from Python."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import lamamba
from lamamba.runs.metadata import ModelMetadata
from lamamba.sampling.settings import read_image_metadata
from tests.autoencoders import make_kl
from tests.files import hashes
from tests.networks import grey_network, random_network, save_model, two_blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "flow"
    return save_model(place, grey_network(), label_names=("ant", "bee", "cat"))


def make(model, out, **changes):
    values = dict(model=model, out=out, num=5, balanced=True, steps=2, batch_size=2, threads=1, device="cpu")
    return lamamba.SampleFolderOptions(**{**values, **changes})


def test_the_call_fills_a_folder_reports_and_verifies_it_again(model, tmp_path, capsys):
    seen, folder = [], tmp_path / "out"
    result = lamamba.sample_folder(make(model, folder, format="both"), progress=seen.append)
    assert (result.folder, result.num, result.files, result.npz) == (folder, 5, "both", folder / "samples.npz")
    assert str(result).startswith(f"done: {folder}, 5 images (PNG files and samples.npz), verified; pixels ")
    assert result.manifest == json.loads((folder / "manifest.json").read_text())
    assert list(dict.fromkeys(p.task for p in seen if p.done == 5)) == ["sampling", "verifying", "writing samples.npz"]
    before = hashes(folder)
    assert lamamba.sample_folder(make(model, folder), progress=None) == result  # the format is the folder's
    assert hashes(folder) == before
    assert capsys.readouterr() == ("", "")


def test_an_autoencoder_may_decode_to_grey(tmp_path):
    make_kl(in_channels=1, out_channels=1, block_out_channels=(8, 8)).save_pretrained(tmp_path / "kl")
    random_network(two_blocks(in_channels=4, objective="flow", width=8)).save_pretrained(tmp_path / "model")
    ModelMetadata(
        objective="flow", image_size=16, codec="latents", autoencoder=str(tmp_path / "kl"),
        label_names=("ant", "bee", "cat"),
    ).save(tmp_path / "model" / "sampling.json")
    lamamba.sample_folder(make(tmp_path / "model", tmp_path / "out", num=2), progress=None)
    assert Image.open(tmp_path / "out" / "000000.png").mode == "L"
    result = lamamba.evaluate(lamamba.EvaluateOptions(
        samples=str(tmp_path / "model"), reference=str(tmp_path / "out"), features="digits", num_images=2,
        labels="balanced", guidance=2.0, steps=2, out=tmp_path / "figures.json", device="cpu",
    ), progress=None)
    assert result.figures["frechet"] == pytest.approx(0, abs=1e-3)              # the same images


def test_it_goes_on_after_an_interruption(model, tmp_path):
    def interrupt(progress):
        if progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lamamba.sample_folder(make(model, tmp_path / "out"), progress=interrupt)
    seen = []
    lamamba.sample_folder(make(model, tmp_path / "out"), progress=seen.append)
    assert seen[0].resumed == 2
    lamamba.sample_folder(make(model, tmp_path / "alone"), progress=None)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def test_it_takes_the_settings_of_a_picture(model, tmp_path):
    lamamba.sample_folder(make(model, tmp_path / "one", guidance=3.0), progress=None)
    like = make(None, tmp_path / "two", like=tmp_path / "one" / "000003.png", steps=None, batch_size=None, seed=3,
                num=1, classes="ant")
    lamamba.sample_folder(like, progress=None)
    old, new = (read_image_metadata(tmp_path / name) for name in ("one/000003.png", "two/000000.png"))
    assert (new.settings, new.seeds, new.labels) == (old.settings, old.seeds, old.labels)


@pytest.mark.parametrize(("changes", "said"), [
    ({"num": None}, "say how many images the folder shall hold"), ({"num": 0}, "num=0 must be at least 1"),
    ({"random_labels": True}, "balanced and random_labels exclude each other"),
    ({"format": "jpg"}, "format 'jpg' is unknown"), ({"batch_size": 0}, "batch_size=0 must be at least 1"),
])
def test_options_that_do_not_fit_are_refused_when_they_are_made(model, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        make(model, tmp_path, **changes)
