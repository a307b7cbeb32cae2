"""Sampling with the flow map of the package: one evaluation for a step, guided or not, on every way to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lamamba
from lamamba.app.session import Request, Session
from lamamba.pipeline import LaMambaPipeline
from lamamba.runs.model import open_model
from lamamba.sampling import generate
from tests.networks import largest_difference
from tests.test_pipeline import images_by_diffusers_alone, run, seeds

NAME = "shipped-few-steps"


@pytest.fixture(scope="module")
def model():
    return open_model(NAME)


def count_rows(network, monkeypatch):
    """The batch sizes of all evaluations of a network from now on."""
    rows, forward = [], type(network).forward

    def counted(self, x, *args, **kwargs):
        rows.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(network), "forward", counted)
    return rows


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 1.75, 4.0])
def test_a_step_costs_one_evaluation_of_each_image(model, monkeypatch, steps, guidance):
    rows = count_rows(model.network, monkeypatch)
    generate(model.network, [1, 2, 3], range(3), num_steps=steps, guidance=guidance)
    assert rows == [3] * steps


def test_image_k_depends_on_seed_k_alone(model):
    together = generate(model.network, [4, 5, 6], [7, 8, 9], num_steps=2, guidance=2.0)
    alone = np.concatenate([
        generate(model.network, [label], [seed], num_steps=2, guidance=2.0) for label, seed in ((4, 7), (5, 8), (6, 9))
    ])
    assert largest_difference(together, alone) <= 1


def test_the_scale_changes_the_image(model):
    images = [generate(model.network, [8], [0], num_steps=1, guidance=scale).astype(int) for scale in (1.0, 4.0)]
    assert np.abs(images[0] - images[1]).max() > 10


def test_a_picture_carries_its_settings_and_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = lamamba.SampleOptions(model=NAME, classes=[3, 7], num=2, steps=1, out=tmp_path / "a.png")
    first = lamamba.sample(options, progress=None)
    assert (first.metadata.settings.sampler, first.metadata.settings.guidance.scale) == ("flow-map", 1.75)
    again = lamamba.sample(lamamba.SampleOptions(like=tmp_path / "a.png"), progress=None)
    assert np.array_equal(first.images, again.images)


@pytest.mark.parametrize(("changes", "said"), [
    (dict(guidance=4.5), "guidance 4.5 is out of range: this flow map takes 1 to 4"),
    (dict(guidance=0.5), "guidance 0.5 is out of range"),
    (dict(guidance_rescale=0.5), "guidance was trained into this flow map"),
    (dict(guidance_interval=(0.2, 0.8)), "guidance was trained into this flow map"),
    (dict(sampler="flow-euler"), "sampler 'flow-euler' is for flow models.*use flow-map"),
])
def test_what_does_not_fit_is_refused_before_any_work(model, monkeypatch, changes, said):
    rows = count_rows(model.network, monkeypatch)
    with pytest.raises(ValueError, match=said):
        lamamba.sample(lamamba.SampleOptions(model=NAME, **changes), progress=None)
    assert not rows


def test_other_models_are_not_sampled_as_flow_maps():
    with pytest.raises(ValueError, match="sampler 'flow-map' is for flow-map models, this one was trained for flow"):
        lamamba.sample(lamamba.SampleOptions(sampler="flow-map"), progress=None)


def test_the_pipeline_makes_the_same_images_and_follows_a_changing_scale(model):
    pipe = LaMambaPipeline.from_pretrained(NAME)
    assert (type(pipe.scheduler).__name__, pipe.config.guidance_scale) == ("FlowMapScheduler", 1.75)
    seeds = [torch.Generator().manual_seed(5)]
    image = np.asarray(pipe(3, generator=seeds, num_inference_steps=2, guidance_scale=3.0).images[0])
    expected = generate(model.network, [3], [5], num_steps=2, guidance=3.0)[0, ..., 0]
    assert largest_difference(image, expected) <= 1

    def change(pipe, step, time, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    changed = np.asarray(pipe(3, generator=[torch.Generator().manual_seed(5)], num_inference_steps=2,
                              guidance_scale=3.0, callback_on_step_end=change).images[0])
    assert largest_difference(image, changed) > 0
    for wrong in (dict(guidance_scale=5.0), dict(guidance_rescale=0.5), dict(guidance_model=pipe.unet)):
        with pytest.raises(ValueError, match="guidance"):
            pipe(3, **wrong)
    with pytest.raises(ValueError, match="use flow-map"):
        pipe.set_sampler("flow-euler")


def test_diffusers_alone_takes_one_two_and_four_steps(tmp_path):
    LaMambaPipeline.from_pretrained(NAME).save_pretrained(tmp_path / "saved")
    pipe = LaMambaPipeline.from_pretrained(tmp_path / "saved")
    steps = (1, 2, 4)
    for count, image in zip(steps, images_by_diffusers_alone(tmp_path / "saved", steps, tmp_path), strict=True):
        assert torch.equal(image, run(pipe, label=1, num_inference_steps=count, generator=seeds(7)))


def test_the_page_offers_its_range_and_its_sampler(model):
    session = Session(model, "few steps")
    assert (session.samplers, session.guidance_range) == (["flow-map"], (1.0, 4.0))
    frames = list(session.sample(Request(classes=("3",), num_images=2, steps=1, guidance=2.0)))
    assert frames[-1].is_last
    with pytest.raises(ValueError, match="this flow map takes 1 to 4"):
        session.check(Request(classes=("3",), guidance=10.0))


def test_it_is_evaluated_at_several_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = lamamba.evaluate(lamamba.EvaluateOptions(
        samples=NAME, reference="digits", features="digits", num_images=20, guidance=[1, 3], steps=1), progress=None)
    assert [entry.protocol["samples"]["evaluations"] for entry in result.entries] == [1, 1]


def test_it_is_not_compressed():
    with pytest.raises(ValueError, match="is a flow map: compress its flow model"):
        lamamba.score_units(lamamba.ScoreUnitsOptions(model=NAME))
