"""lamamba.sample: pictures and films from Python."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import lamamba
from lamamba.diffusion.denoise import samplers_for
from lamamba.sampling import generate
from lamamba.sampling.prepare import with_fast_preset
from lamamba.sampling.settings import Interpolated, read_image_metadata
from tests.networks import grey_network, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "flow"
    return save_model(place, grey_network(), label_names=("ant", "bee", "cat"), guidance=1.5)


def sample(model, **changes):
    values = dict(model=model, classes=[1, "cat"], num=3, seed=5, steps=2, device="cpu")
    return lamamba.sample(lamamba.SampleOptions(**{**values, **changes}), progress=None)


def test_images_seeds_labels_and_a_picture_without_a_file(model):
    result = sample(model)
    assert (result.labels, result.seeds) == ((1, 1, 1, 2, 2, 2), (5, 6, 7, 8, 9, 10))
    network = lamamba.open_model(model).network
    images = generate(network, result.labels, result.seeds, num_steps=2, guidance=1.5)     # the model's own scale
    np.testing.assert_array_equal(result.images, images)
    assert str(result) == "6 images, seeds 5 to 10, flow-euler in 2 steps, guidance 1.5"
    assert "array" not in repr(result)
    with Image.open(io.BytesIO(result._repr_png_())) as picture:
        assert picture.size == result.picture.size
        assert "lamamba" in picture.text


def test_classes_may_be_an_array(model):
    assert sample(model, classes=np.array([2, 0]), num=1).labels == (2, 0)


def test_no_classes_are_not_the_default_ones(model):
    with pytest.raises(ValueError, match="classes names none: give at least one"):
        sample(model, classes=[])


def test_a_png_repeats_itself(model, tmp_path):
    first = sample(model, out=tmp_path / "a.png", guidance=3.0)
    assert str(first).startswith(f"{tmp_path / 'a.png'}: 6 images")
    assert read_image_metadata(tmp_path / "a.png") == first.metadata
    again = lamamba.sample(
        lamamba.SampleOptions(like=tmp_path / "a.png", out=tmp_path / "b.png", device="cpu"), progress=None)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert again.metadata == first.metadata


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(
    ("objective", "sampler", "steps"), [("flow", "flow-unipc", 8), ("noise", "dpm++", 16), ("v", "dpm++", 16)])
def test_the_fast_preset_fills_what_is_not_given(objective, sampler, steps, has_bfloat16, monkeypatch):
    monkeypatch.setattr("lamamba.sampling.prepare.multiplies_bfloat16", lambda device: has_bfloat16)
    options = with_fast_preset(lamamba.SampleOptions(fast=True), objective, torch.device("cpu"))
    assert (options.sampler, options.steps) == (sampler, steps)
    assert options.dtype == ("bfloat16" if has_bfloat16 else "float32")
    given = lamamba.SampleOptions(fast=True, sampler=samplers_for(objective)[0], dtype="float16")
    options = with_fast_preset(given, objective, torch.device("cpu"))
    assert (options.sampler, options.steps, options.dtype) == (given.sampler, None, "float16")


def test_the_fast_preset_draws_with_the_few_step_model(model, tmp_path):
    options = lamamba.SampleOptions(fast=True, classes=[3], num=2, out=tmp_path / "a.png")
    settings = lamamba.sample(options, progress=None).metadata.settings
    assert (settings.model, settings.sampler, settings.steps) == ("shipped-few-steps", "flow-map", 1)
    assert str(sample(model, fast=True)) == "6 images, seeds 5 to 10, flow-unipc in 2 steps, guidance 1.5"
    with pytest.raises(ValueError, match="fast and like exclude each other"):
        lamamba.sample(lamamba.SampleOptions(fast=True, like=tmp_path / "a.png"))


def test_a_png_says_how_deep_features_were_kept(model, tmp_path):
    settings = dict(steps=8, guidance=3.0, out=tmp_path / "a.png")
    first = sample(model, cache=3, **settings)
    assert str(first).endswith("flow-euler in 8 steps, guidance 3, cache 3")
    assert first.metadata.settings.cache == lamamba.LaMambaCacheConfig(interval=3)
    assert read_image_metadata(tmp_path / "a.png") == first.metadata
    again = lamamba.sample(
        lamamba.SampleOptions(like=tmp_path / "a.png", out=tmp_path / "b.png", device="cpu"), progress=None)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert again.metadata.settings.what_counts()["cache order"] == 1
    repeated = sample(model, cache=3, cache_order=0, **settings)
    plain = sample(model, **settings)
    assert "cache" not in plain.metadata.settings.to_dict()                     # older versions read it
    np.testing.assert_array_equal(sample(model, cache=1, **settings).images, plain.images)
    assert not np.array_equal(first.images, plain.images)
    assert not np.array_equal(first.images, repeated.images)


def test_classes_are_given_as_words_numbers_or_a_list(model):
    for classes in ("1,cat", ["bee", 2], (1, 2), [np.int64(1), "2"]):
        assert sample(model, classes=classes, num=1).labels == (1, 2)


def test_an_interpolation_and_its_film(model, tmp_path):
    result = sample(model, classes=None, interpolate="classes:ant:cat", num=4, out=tmp_path / "way.gif")
    assert result.labels[:2] == (Interpolated(0, 2, 0.0), Interpolated(0, 2, 1 / 3))
    assert (result.num_frames, str(result)) == (4, f"{tmp_path / 'way.gif'}: a film of 4 pictures")
    assert sample(model, steps=7, out=tmp_path / "steps.gif").num_frames == 7


def test_progress_is_reported_in_steps(model):
    seen = []
    options = lamamba.SampleOptions(model=model, classes=[0], num=3, steps=2, batch_size=2, device="cpu")
    lamamba.sample(options, progress=seen.append)
    assert [(p.task, p.done, p.total, p.unit) for p in seen] == [("sampling", k, 4, "steps") for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(("changes", "said"), [
    ({"out": "x.jpg"}, "pictures are .png"), ({"num": 0}, "num=0 must be at least 1"),
    ({"fps": 51}, "fps=51 must be at most 50"), ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must be at most 1"),
    ({"cache": 0}, "cache=0 must be at least 1"), ({"cache_order": 1}, "cache_order=1 needs a cache"),
    ({"cache": 3}, "interval 3 is longer than the run: the run has 2 evaluations"),
    ({"steps": 1, "cache": 2}, "the run has 1 evaluation of the network"),
    ({"classes": ["bees"]}, "did you mean 'bee'"), ({"sampler": "ddpm"}, "this one was trained for flow"),
])
def test_options_that_do_not_fit_are_refused(model, changes, said):
    with pytest.raises(ValueError, match=said):
        sample(model, **changes)


@pytest.mark.parametrize("name", ["model", "lora", "like", "autoencoder"])
def test_an_empty_path_is_not_the_current_folder(name):
    with pytest.raises(ValueError, match=f"{name}.*an empty path; leave it out"):
        lamamba.SampleOptions(**{name: ""})
