"""Training a flow map: from its teacher's output, the same in one piece and resumed, on one process and on two."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lamamba
from lamamba.diffusion.flow_map import FlowFromNoise
from lamamba.diffusion.schedule import NoiseSchedule
from lamamba.options.training import DistillOptions
from lamamba.runs.model import open_network
from lamamba.training.distill import VelocityTeacher
from lamamba.training.loop import describe, train
from tests.training.test_processes import assert_two_processes_make_the_same_run
from tests.training.together import FewDigits, config, losses_of, save_teacher, states_equal

MAP = dict(objective="flow-map", guidance_range=(1.0, 4.0))
OWN = dict(student_share=0.5)


@pytest.fixture(scope="module")
def data():
    return FewDigits(8)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), data)


def flow_map(teacher, **changes):
    """A run that starts from its teacher."""
    return config(**{**dict(model=MAP, start=dict(source=str(teacher)), distill=dict(teacher=str(teacher))), **changes})


def test_steps_without_length_have_no_loss_at_first(data, teacher, tmp_path):
    """The network is then its teacher, whose velocity without guidance it learns there."""
    only = dict(velocity_share=0.999999)
    train(flow_map(teacher, model=dict(objective="flow-map"), flow_map=only, steps=1), data, tmp_path / "velocity")
    assert losses_of(tmp_path / "velocity")[0] < 1e-9
    train(flow_map(teacher, flow_map=only, steps=1), data, tmp_path / "guided")
    train(flow_map(teacher, model=dict(objective="flow-map"), steps=1), data, tmp_path / "map")
    assert min(losses_of(tmp_path / "guided")[0], losses_of(tmp_path / "map")[0]) > 1e-6


def test_it_resumes_to_the_bit(data, teacher, tmp_path):
    settings = flow_map(
        teacher, flow_map=OWN, processes=dict(accumulation_steps=2), watch=dict(held_out=2, held_out_every=2)
    )
    whole = train(settings, data, tmp_path / "whole")
    train(dataclasses.replace(settings, steps=2), data, tmp_path / "parts")
    parts = train(settings, data, tmp_path / "parts")
    assert states_equal(whole, parts)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_targets_come_from_the_average_that_lags_least(data, teacher, tmp_path):
    first = train(flow_map(teacher, ema_decays=(0.5,)), data, tmp_path / "one")
    second = train(flow_map(teacher, ema_decays=(0.999, 0.5)), data, tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_make_the_same_run(teacher, tmp_path, sharding):
    """Three images each, of which some steps have no velocity or no map."""
    settings = flow_map(teacher, flow_map=OWN, batch_size=6, ema_decays=(0.9,), optimizer=dict(learning_rate=1e-3))
    assert_two_processes_make_the_same_run(settings, sharding, tmp_path)


def test_it_learns_from_data_alone(data, tmp_path):
    state = train(config(model=dict(objective="flow-map"), steps=2), data, tmp_path / "run")
    network, metadata = open_network(tmp_path / "run")
    assert network.architecture == state.model.architecture
    assert (metadata.objective, metadata.guidance) == ("flow-map", 1.0)


@pytest.mark.parametrize("objective", ["flow", "noise", "v"])
def test_the_teachers_velocity_is_guided(data, tmp_path, objective):
    folder = save_teacher(tmp_path, data, objective=objective)
    student, metadata = describe(flow_map(folder), data)
    teacher = VelocityTeacher(DistillOptions(teacher=str(folder)), student, metadata, torch.device("cpu"))
    network = open_network(folder)[0]
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.6, 1.0]), torch.tensor([1, 2, 3])
    scale = torch.tensor([1.0, 2.0, 3.5])

    def velocity(labels):
        with torch.no_grad():
            if objective == "flow":
                return network(x, t * 1000, labels)
            conversion = FlowFromNoise(NoiseSchedule(objective))
            y, timestep = conversion.inputs(x, t)
            return conversion.velocity(network(y, timestep, labels), y, t)

    cond, uncond = velocity(labels), velocity(torch.full((3,), student.num_classes))
    expected = uncond + scale.view(3, 1, 1, 1) * (cond - uncond)
    torch.testing.assert_close(teacher.velocity(x, t, labels, scale), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.velocity(x, t, labels, None), cond, rtol=1e-4, atol=1e-4)


def test_the_plan_of_the_recipe_has_its_network():
    plan = lamamba.plan(lamamba.TrainOptions.from_recipe("digits_few_steps", device="cpu"))
    source = open_network("shipped")[0].architecture                            # which the recipe does not repeat
    assert plan.architecture == dataclasses.replace(source, objective="flow-map", guidance_range=(1.0, 4.0))


def test_what_does_not_fit_is_refused(data, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"ema_decays=\(0.9999,\): a flow map learns from its own average"):
        flow_map(teacher, ema_decays=(0.9999,))
    with pytest.raises(ValueError, match="leave task, output, feature, features and stages"):
        flow_map(teacher, distill=dict(teacher=str(teacher), output=2.0))
    with pytest.raises(ValueError, match=r"model.guidance_range=\(1.0, 4.0\) needs a guided teacher"):
        config(model=MAP)
    with pytest.raises(ValueError, match="student_share=0.5 needs the velocity where no image was noised"):
        config(model=dict(objective="flow-map"), flow_map=OWN)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="guidance 9 is out of range: this flow map takes 1 to 4"):
        train(flow_map(teacher, sampling=dict(guidance=9.0)), data, folder)
    with pytest.raises(ValueError, match="num_classes: 10 there, 0 here"):
        train(flow_map(teacher, data=dict(use_labels=False), model=dict(objective="flow-map"),
                       start=dict(source=None)), data, folder)
    other = save_teacher(tmp_path / "map", data, objective="flow-map")
    with pytest.raises(ValueError, match="objective: 'flow-map' there, and a velocity comes from flow, noise or v"):
        train(flow_map(teacher, distill=dict(teacher=str(other))), data, folder)
    noise = save_teacher(tmp_path / "noise", data, objective="noise")
    with pytest.raises(ValueError, match="noise is a noise model, and a flow map starts from a flow or a flow map"):
        train(flow_map(teacher, start=dict(source=str(noise))), data, folder)
    with pytest.raises(ValueError, match="width: 8 there, 16 here"):
        train(flow_map(teacher, model=dict(width=16, **MAP)), data, folder)
    assert not list(folder.glob("checkpoints/*"))
