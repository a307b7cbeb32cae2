"""What the page draws is what lamamba sample makes of the same settings; wrong ones are refused in words."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from lamamba.app.session import MAX_IMAGES, Request, Session
from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.pretrained import shipped_model
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import find_network
from lamamba.sampling import generate
from lamamba.sampling.settings import ImageMetadata

ASKED = Request(classes=("3", "7"), num=2, seed=11, sampler="flow-euler", steps=6, guidance=1.75)


@pytest.fixture(scope="module")
def studio():
    model, facts = find_network(shipped_model())
    return Session(model, facts, name="digits", source=str(shipped_model()))


def expected(studio, labels, seeds, **settings):
    return generate(studio.model, labels, seeds, **settings)


def test_a_drawing_is_what_generate_makes(studio):
    *_, last = studio.draw(ASKED)
    images = expected(studio, [3, 3, 7, 7], [11, 12, 13, 14], sampler="flow-euler", num_steps=6, guidance=1.75)
    np.testing.assert_array_equal(last.images, images)


def test_the_way_there_is_shown(studio):
    frames = list(studio.draw(dataclasses.replace(ASKED, steps=30)))
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert len(frames) >= 3
    steps = [frame.done for frame in frames]
    assert steps == sorted(steps)
    assert steps[-1] == frames[-1].total == 30
    distances = [float(np.abs(frame.images.astype(int) - frames[-1].images).mean()) for frame in frames]
    assert distances[0] > 10                                                    # grey levels
    assert distances[-2] < distances[0] / 2


def test_facts_repeat_the_drawing(studio):
    *_, last = studio.draw(ASKED)
    facts = ImageMetadata.from_dict(studio.facts_of(ASKED).to_dict())
    model, _ = find_network(facts.settings.model)
    again = generate(
        model, list(facts.labels), list(facts.seeds), sampler=facts.settings.sampler, num_steps=facts.settings.steps,
        guidance=facts.settings.guidance,
    )
    np.testing.assert_array_equal(again, last.images)
    assert (facts.columns, facts.row_names) == (2, ("3", "7"))
    assert (facts.settings.height, facts.settings.width) == (8, 8)


def test_defaults_are_written_down(studio):
    facts = studio.facts_of(Request(classes=("0",), num=8))
    assert facts.settings.sampler == studio.samplers[0]
    assert facts.settings.steps >= 1
    assert facts.columns == 4                                                   # a single class about in a square


def test_other_sizes_leave_the_network_as_it_was(studio):
    *_, wide = studio.draw(dataclasses.replace(ASKED, height=12, width=16))
    assert wide.images.shape == (4, 12, 16, 1)
    *_, last = studio.draw(ASKED)
    assert last.images.shape == (4, 8, 8, 1)


def test_closing_stops_the_work(studio):
    before = threading.active_count()
    drawing = studio.draw(dataclasses.replace(ASKED, num=20, steps=900))
    assert next(drawing).done <= 2
    drawing.close()
    assert threading.active_count() == before
    *_, last = studio.draw(ASKED)                                               # and the next one has its turn
    assert last.is_last


def test_two_at_once_do_not_mix(studio):
    wide = dataclasses.replace(ASKED, height=16, width=16, steps=12)
    results = {}

    def run(name, request):
        *_, results[name] = studio.draw(request)

    threads = [threading.Thread(target=run, args=pair) for pair in (("wide", wide), ("small", ASKED))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images = expected(studio, [3, 3, 7, 7], [11, 12, 13, 14], sampler="flow-euler", num_steps=6, guidance=1.75)
    np.testing.assert_array_equal(results["small"].images, images)
    assert results["wide"].images.shape == (4, 16, 16, 1)


@pytest.mark.parametrize(("change", "said"), [
    ({"classes": ()}, "no class is chosen"),
    ({"classes": ("three",)}, "class 'three' is unknown"),
    ({"num": 0}, "number of images is 0"),
    ({"num": 2.5}, "number of images is 2.5"),
    ({"num": 60}, f"up to {MAX_IMAGES} at once"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": None}, "seed is None"),
    ({"sampler": "ddpm"}, "sampler for this model 'ddpm' is unknown"),
    ({"steps": 0}, "number of steps is 0"),
    ({"steps": 5000}, "number of steps is 5000"),
    ({"guidance": float("nan")}, "guidance nan"),
    ({"guidance": "much"}, "guidance 'much'"),
    ({"height": 10}, "height 10 does not fit this model: it must be a multiple of 4 pixels; the nearest is 8 or 12"),
    ({"width": 4096}, "width is 4096"),
])
def test_what_does_not_fit_is_refused_in_words(studio, change, said):
    with pytest.raises(ValueError, match=said):
        next(studio.draw(dataclasses.replace(ASKED, **change)))


def test_a_model_without_classes():
    config = UNetConfig.preset(
        "s", width=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1, window_size=4, objective="v", in_channels=3,
        num_classes=0, grid=8,
    )
    studio = Session(
        LaMambaUNet(config).eval(), ModelMetadata(objective="v", image_size=8), name="photos", source="runs/photos"
    )
    *_, last = studio.draw(Request(num=3, steps=4))
    assert last.images.shape == (3, 8, 8, 3)
    assert studio.facts_of(Request(num=3)).labels is None
    with pytest.raises(ValueError, match="this model has none: use 1"):
        next(studio.draw(Request(num=3, steps=4, guidance=2.0)))


def test_an_error_of_the_network_arrives(studio, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(torch.nn.Embedding, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(studio.draw(ASKED))
