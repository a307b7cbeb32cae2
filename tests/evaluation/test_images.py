"""Sets of images that are evaluated: cropped as training crops, or refused with the command that crops them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import lamamba
from lamamba.data.images import Images
from lamamba.data.sources import FolderSource
from lamamba.evaluation.images import FolderImages
from lamamba.metrics.networks import open_network
from tests.networks import TINY

SIZES = ((16, 16), (40, 24), (19, 33), (8, 9))


@pytest.fixture
def photos(tmp_path):
    """Colour photos of four sizes, the first one grey where it is asked for."""
    (tmp_path / "photos").mkdir()
    for k, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert("L" if k == 1 else "RGB").save(tmp_path / "photos" / f"{k}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_cropped_and_converted_as_training_does(photos, channels):
    trained, _ = Images(FolderSource(photos), 16, channels).read(range(len(SIZES)))
    images = FolderImages(photos, size=16, channels=channels)
    assert images.shape == (16, 16, channels)
    assert np.array_equal(images.read(range(len(SIZES))), trained.transpose(0, 2, 3, 1))


def test_images_of_several_sizes_are_refused_with_what_crops_them(photos):
    with pytest.raises(ValueError, match=r"1\.png is 24 x 40 grey.*lamamba evaluate stats .*photos --image-size N"):
        FolderImages(photos).read(range(len(SIZES)))


def mean_colour(images):
    return images.reshape(len(images), -1, images.shape[3]).mean(axis=1)


@pytest.fixture
def own_features(tmp_path, monkeypatch):
    """A file in the current folder, which is not on Python's path."""
    name = f"features_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("def mean(images):\n    return images.mean(axis=(1, 2))\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_run_is_evaluated_against_photos_of_any_size(photos, own_features, tmp_path):
    """And against their statistics, which are the same."""
    lamamba.train(lamamba.TrainOptions.from_recipe(
        "folder", out=tmp_path / "run", model=TINY, data=dict(source=str(photos), image_size=16), steps=1,
        batch_size=2, sampling=dict(every=0), device="cpu",
    ), progress=None)
    common = dict(features=f"{own_features}:mean", device="cpu")
    options = dict(num_images=3, steps=1, **common)
    direct = lamamba.evaluate(lamamba.EvaluateOptions(
        samples=str(tmp_path / "run"), reference=str(photos), out=tmp_path / "a.json", **options), progress=None)
    lamamba.compute_statistics(lamamba.StatisticsOptions(
        images=str(photos), out=tmp_path / "photos.npz", image_size=16, **common), progress=None)
    stored = lamamba.evaluate(lamamba.EvaluateOptions(
        samples=str(tmp_path / "run"), reference=str(tmp_path / "photos.npz"), out=tmp_path / "b.json", **options,
    ), progress=None)
    assert direct.figures["frechet"] == pytest.approx(stored.figures["frechet"], rel=1e-5)


def test_features_are_found_in_the_current_folder(own_features):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    for name in (f"{own_features}:mean", f"{own_features}.py:mean"):
        network = open_network(name, None, "cpu")
        assert np.allclose(network(images)["features"], mean_colour(images))


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere:f", "nowhere.py in the current folder"), ("OWN:gone", "has no function gone"),
    ("OWN:number", "has no function number"), ("..x:f", "in the current folder"), (":f", "in the current folder"),
    ("wrong:f", "invalid syntax"), ("incepton", "did you mean 'inception'"),
])
def test_features_that_are_not_there(own_features, tmp_path, name, said):
    (tmp_path / "wrong.py").write_text("def f(:")
    with pytest.raises(ValueError, match=said) as caught:
        open_network(name.replace("OWN", own_features), None, "cpu")
    assert "\n" not in str(caught.value)


def test_offline_the_alternatives_are_named(tmp_path, monkeypatch):
    def offline(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(OSError, match="weights=FILE. Without them: features=digits .* or features=module:function"):
        open_network("inception", None, "cpu")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.Dinov2Model, "from_pretrained", offline)
    with pytest.raises(OSError, match="weights=FOLDER. Without them: features=inception"):
        open_network("dinov2", None, "cpu")
