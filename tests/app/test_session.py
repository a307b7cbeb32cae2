"""The page samples as lamamba sample does with the same settings; what does not fit is refused with the reason."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from lamamba import LaMambaCacheConfig
from lamamba.app.session import MAX_IMAGES, Request, Session
from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.pretrained import shipped_model
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import Model, fingerprint, open_model, open_network
from lamamba.sampling import generate
from lamamba.sampling.settings import ImageMetadata
from tests.networks import TINY, grey_network, save_model

REQUEST = Request(classes=("3", "7"), num_images=2, seed=11, sampler="flow-euler", steps=6, guidance=1.75)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Of a small network with the digits' classes."""
    network = grey_network(num_classes=10)
    folder = save_model(tmp_path_factory.mktemp("model"), network, label_names=tuple("0123456789"), guidance=1.75)
    return Session(open_model(folder), "digits")


def expected(session, labels, seeds, **settings):
    return generate(session.model.network, labels, seeds, **settings)


def test_samples_are_those_of_generate(session):
    *_, last = session.sample(REQUEST)
    images = expected(session, [3, 3, 7, 7], [11, 12, 13, 14], sampler="flow-euler", num_steps=6, guidance=1.75)
    np.testing.assert_array_equal(last.images, images)


def test_frames_show_the_denoising():
    session = Session(open_model(shipped_model()), "digits")
    frames = list(session.sample(dataclasses.replace(REQUEST, steps=30)))
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert len(frames) >= 3
    steps = [frame.done for frame in frames]
    assert steps == sorted(steps)
    assert steps[-1] == frames[-1].total == 30
    distances = [float(np.abs(frame.images.astype(int) - frames[-1].images).mean()) for frame in frames]
    assert distances[0] > 10                                                    # grey levels
    assert distances[-2] < distances[0] / 2


def test_deep_features_are_kept_as_the_request_says(session):
    request = dataclasses.replace(REQUEST, cache=3)
    *_, last = session.sample(request)
    cache = LaMambaCacheConfig(interval=3)
    images = expected(session, [3, 3, 7, 7], [11, 12, 13, 14], num_steps=6, guidance=1.75, cache=cache)
    np.testing.assert_array_equal(last.images, images)
    assert session.metadata_of(request).settings.cache == cache
    assert session.metadata_of(REQUEST).settings.cache is None


def test_the_metadata_reproduces_the_images(session):
    *_, last = session.sample(REQUEST)
    facts = ImageMetadata.from_dict(session.metadata_of(REQUEST).to_dict())
    model, _ = open_network(facts.settings.model)
    again = generate(
        model, list(facts.labels), list(facts.seeds), sampler=facts.settings.sampler, num_steps=facts.settings.steps,
        guidance=facts.settings.guidance,
    )
    np.testing.assert_array_equal(again, last.images)
    assert (facts.columns, facts.row_names) == (2, ("3", "7"))
    assert (facts.settings.height, facts.settings.width) == (8, 8)


def test_the_default_guidance_is_the_models_own(session):
    assert session.default_guidance == session.model.metadata.guidance == 1.75
    metadata = dataclasses.replace(session.model.metadata, guidance=3.5)
    assert Session(dataclasses.replace(session.model, metadata=metadata), "digits").default_guidance == 3.5


def test_classes_whose_names_are_numbers_go_by_number(session):
    names = tuple(str(10 - label) for label in range(10))
    metadata = dataclasses.replace(session.model.metadata, label_names=names)
    facts = Session(dataclasses.replace(session.model, metadata=metadata), "toy").metadata_of(
        Request(classes=("1", "9"), num_images=1))
    assert (facts.labels, facts.row_names) == ((1, 9), ("9", "1"))


def test_defaults_are_written_down(session):
    facts = session.metadata_of(Request(classes=("0",), num_images=8))
    assert facts.settings.sampler == session.samplers[0]
    assert facts.settings.steps >= 1
    assert facts.columns == 4                                                   # a single class about in a square


def test_other_sizes_leave_the_network_as_it_was(session):
    *_, wide = session.sample(dataclasses.replace(REQUEST, height=12, width=16))
    assert wide.images.shape == (4, 12, 16, 1)
    *_, last = session.sample(REQUEST)
    assert last.images.shape == (4, 8, 8, 1)


def test_closing_stops_the_work(session):
    before = threading.active_count()
    frames = session.sample(dataclasses.replace(REQUEST, num_images=20, steps=900))
    assert next(frames).done <= 2
    frames.close()
    assert threading.active_count() == before
    *_, last = session.sample(REQUEST)                                               # and the next one has its turn
    assert last.is_last


def test_two_requests_at_once_do_not_mix(session):
    wide = dataclasses.replace(REQUEST, height=16, width=16, steps=12)
    results = {}

    def run(name, request):
        *_, results[name] = session.sample(request)

    threads = [threading.Thread(target=run, args=pair) for pair in (("wide", wide), ("small", REQUEST))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images = expected(session, [3, 3, 7, 7], [11, 12, 13, 14], sampler="flow-euler", num_steps=6, guidance=1.75)
    np.testing.assert_array_equal(results["small"].images, images)
    assert results["wide"].images.shape == (4, 16, 16, 1)


@pytest.mark.parametrize(("change", "said"), [
    ({"classes": ()}, "no class is chosen"),
    ({"classes": ("three",)}, "label 'three' is unknown"),
    ({"num_images": 0}, "number of images is 0"),
    ({"num_images": 2.5}, "number of images is 2.5"),
    ({"num_images": 60}, f"up to {MAX_IMAGES} at once"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": None}, "seed is None"),
    ({"sampler": "ddpm"}, "sampler for this model 'ddpm' is unknown"),
    ({"steps": 0}, "number of steps is 0"),
    ({"steps": 5000}, "number of steps is 5000"),
    ({"guidance": float("nan")}, "guidance nan"),
    ({"guidance": "much"}, "guidance 'much'"),
    ({"height": 10}, "height 10 does not fit this model: it must be a multiple of 4 pixels; the nearest is 8 or 12"),
    ({"width": 4096}, "width is 4096"),
    ({"cache": 0}, "interval of full passes is 0"),
    ({"cache": 7}, "interval 7 is longer than the run"),
])
def test_what_does_not_fit_is_refused_in_words(session, change, said):
    with pytest.raises(ValueError, match=said):
        next(session.sample(dataclasses.replace(REQUEST, **change)))


def test_a_model_without_classes():
    config = UNetConfig.preset(
        "s", **TINY, window_size=4, objective="v", in_channels=3, num_classes=0, grid=8,
    )
    network, metadata = LaMambaUNet(config).eval(), ModelMetadata(objective="v", image_size=8)
    session = Session(Model("runs/photos", network, metadata, fingerprint(network), None), "photos")
    assert session.default_guidance == 1
    *_, last = session.sample(Request(num_images=3, steps=4))
    assert last.images.shape == (3, 8, 8, 3)
    assert session.metadata_of(Request(num_images=3)).labels is None
    with pytest.raises(ValueError, match="this model has none: use 1"):
        next(session.sample(Request(num_images=3, steps=4, guidance=2.0)))


def test_an_error_of_the_network_arrives(session, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(torch.nn.Embedding, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(session.sample(REQUEST))
