"""Flow maps, against the flow of Gaussian data: velocity, mean velocity and its whole path are known exactly.

    x0 ~ N(m, s^2), x_t ~ N((1 - t) m, d_t^2), d_t^2 = (1 - t)^2 s^2 + t^2,  x_r = (1 - r) m + d_r/d_t (x_t - (1 - t) m)
"""

from __future__ import annotations

import pytest
import torch

from lamamba.diffusion.denoise import check_scheduler, denoise, make_scheduler, set_steps
from lamamba.diffusion.flow_map import (
    FlowFromNoise,
    TimeShares,
    draw_scale,
    flow_map_loss,
    flow_map_target,
    own_share,
    step_to,
    student_states,
)
from lamamba.diffusion.flow_map_scheduler import FlowMapScheduler
from lamamba.diffusion.schedule import FlowSchedule, NoiseSchedule

MEAN, DEVIATION = 0.3, 0.5


def like(t, x):
    return t.view(-1, 1, 1, 1).to(x)


def deviation(t):
    return ((1 - t).square() * DEVIATION**2 + t.square()).sqrt()


def position(x, t, r):
    """Where the path through x at t is at r."""
    return (1 - r) * MEAN + deviation(r) / deviation(t) * (x - (1 - t) * MEAN)


def exact_velocity(x, t):
    """E[eps - x0 | x_t]."""
    t = like(t, x)
    return (t - (1 - t) * DEVIATION**2) / deviation(t).square() * (x - (1 - t) * MEAN) - MEAN


def exact_map(x, t, r):
    """The mean velocity from t to r < t."""
    t, r = like(t, x), like(r, x)
    return (x - position(x, t, r)) / (t - r)


def batch(count=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=0.05)
    r = t * torch.rand(count, generator=generator, dtype=torch.float64)
    t[:4], r[4:8] = 1, 0
    r[8:16] = t[8:16]
    return x, t, r


def test_the_exact_map_is_a_fixed_point_of_the_target():
    x, t, r = batch()
    asked = []

    def velocity(x, t, rows):
        asked.extend(rows.tolist())
        return exact_velocity(x, t)

    target = flow_map_target(x, t, r, lambda x, t, r, rows: exact_map(x, t, r), velocity)
    is_map = r < t
    torch.testing.assert_close(target[is_map], exact_map(x, t, r)[is_map].float())
    torch.testing.assert_close(target[~is_map], exact_velocity(x, t)[~is_map].float())
    assert sorted(asked) == (~is_map).nonzero()[:, 0].tolist()                  # nowhere else


def test_short_half_steps_begin_with_the_velocity():
    x, t, r = batch()
    half = (t - r) / 2
    target = flow_map_target(
        x, t, r, lambda x, t, r, rows: exact_map(x, t, r) if len(rows) else x, lambda x, t, rows: exact_velocity(x, t),
        smallest_gap=0.1)
    is_short = (half > 0) & (half < 0.1)
    s = t - half
    first = exact_velocity(x, t)
    second = exact_map(step_to(x, first.float(), t, s), s, r)
    torch.testing.assert_close(target[is_short], ((first + second) / 2)[is_short].float())
    is_long = half >= 0.1
    torch.testing.assert_close(target[is_long], exact_map(x, t, r)[is_long].float())


@pytest.mark.parametrize("same", [True, False])
def test_a_batch_of_one_kind_calls_every_network_as_often(same):
    """As ranks must that wait for one another."""
    x, t, _ = batch(3)
    r = t if same else t / 4
    calls = []
    target = flow_map_target(
        x, t, r, lambda x, t, r, rows: calls.append("student") or exact_map(x, t, r - 1e-3),
        lambda x, t, rows: calls.append("velocity") or exact_velocity(x, t))
    assert sorted(calls) == ["student", "student", "velocity"]
    assert target.isfinite().all()
    if same:
        torch.testing.assert_close(target, exact_velocity(x, t).float())


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_student_states_lie_on_its_path_from_noise(share):
    x, t, _ = batch()
    eps, ones, calls = torch.randn_like(x), torch.ones_like(t), []
    chosen = torch.arange(len(x)) < share * len(x)

    def student(x, t, r, rows):
        calls.append(rows)
        return exact_map(x, t, r - 1e-9)                                        # of no length where t = 1

    found = student_states(x, eps, t, student, chosen)
    expected = position(eps, like(ones, x), like(t, x))
    torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[~chosen], x[~chosen])
    assert torch.equal(found[:4][chosen[:4]], eps[:4][chosen[:4]])              # pure noise
    assert len(calls) == 1                                                      # of ranks that wait for one another


def test_the_share_of_own_paths_grows_with_the_scale():
    scale = torch.tensor([1.0, 2.5, 4.0])
    assert own_share(scale, (1.0, 4.0), 0.5).tolist() == [0, 0.25, 0.5]
    assert own_share(None, None, 0.5) == 0.5


def test_the_loss_is_the_error_over_its_own_root():
    output = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    loss = flow_map_loss(output, torch.zeros(2, 2))
    assert loss.tolist() == pytest.approx([12.5 / 12.501**0.5, 0])
    loss.sum().backward()
    torch.testing.assert_close(output.grad, torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / 12.501**0.5)


def test_times_are_drawn_as_described():
    uniform = torch.rand(40_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = FlowSchedule((0.4, 1.2)).timestep(uniform[:, 4]) / 1000
    drawn, r = TimeShares(0.25, 0.4, 0.3).draw(t, uniform[:, :4])
    assert (r <= drawn).all()
    assert (r >= 0).all()
    assert torch.equal(drawn[drawn < 1], t[drawn < 1])
    is_map = r < drawn
    for share, expected in (((drawn == 1), 0.25), (~is_map, 0.4), ((r[is_map] == 0), 0.3)):
        assert float(share.double().mean()) == pytest.approx(expected, abs=0.01)
    inside = is_map & (r > 0)
    assert float((r / drawn)[inside].mean()) == pytest.approx(0.5, abs=0.01)
    scale = draw_scale(uniform[:, 0], (1.0, 4.0))
    assert 1 <= float(scale.min()) < float(scale.max()) <= 4
    assert float((scale < 1.75).double().mean()) == pytest.approx(0.5, abs=0.01)
    with_share = draw_scale(uniform[:, 0], (1.0, 4.0), 0.25)
    assert float((with_share == 1).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((with_share[with_share > 1] < 1.75).double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_a_noise_network_has_the_flows_velocity(objective):
    """The exact predictions for Gaussian data, between the schedule's levels; finite beyond them."""
    schedule = NoiseSchedule(objective)
    conversion = FlowFromNoise(schedule)
    x = torch.randn(200, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    y, timestep = conversion.inputs(x, t)
    assert ((timestep >= 0) & (timestep <= 999)).all()
    assert (timestep.diff() >= 0).all()
    whole = timestep[(timestep > 0) & (timestep < 999)]
    torch.testing.assert_close(                                                 # the timestep has the path's ratio
        torch.lerp(*(conversion._log_ratio[i] for i in (whole.long(), whole.long() + 1)), (whole % 1).double()),
        torch.logit(t)[(timestep > 0) & (timestep < 999)], rtol=0, atol=1e-4)
    a = ((1 - t).square() + t.square()).sqrt()
    image, noise = like((1 - t) / a, x), like(t / a, x)
    torch.testing.assert_close(y, x / like(a, x))
    eps = noise / (image.square() * DEVIATION**2 + noise.square()) * (y - image * MEAN)      # E[eps | y]
    x0 = MEAN + image * DEVIATION**2 / (image.square() * DEVIATION**2 + noise.square()) * (y - image * MEAN)
    output = eps if objective == "noise" else image * eps - noise * x0
    velocity = conversion.velocity(torch.cat([output, output], 1), y, t)
    assert velocity.shape == x.shape
    assert velocity.isfinite().all()
    inside = (t > 0.01) & (t < 0.99)
    torch.testing.assert_close(velocity[inside], exact_velocity(x, t)[inside], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_the_exact_map_samples_exactly_in_any_number_of_steps(steps):
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler("flow-map", "flow-map", steps)
    ends = dict(zip(scheduler.timesteps.tolist(), scheduler.end_timesteps.tolist(), strict=True))
    assert list(ends.values()) == [*list(ends)[1:], 0]
    x0 = denoise(lambda x, t: exact_map(x, t / 1000, torch.full_like(t, ends[float(t[0])] / 1000)), scheduler, noise)
    torch.testing.assert_close(x0, MEAN + DEVIATION * noise)


def test_the_scheduler_keeps_diffusers_contract(tmp_path):
    scheduler = FlowMapScheduler()
    scheduler.save_pretrained(tmp_path)
    scheduler = FlowMapScheduler.from_pretrained(tmp_path)
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    x, u = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    assert scheduler.step_index is None
    (stepped,) = scheduler.step(u, scheduler.timesteps[1], x, return_dict=False)
    assert scheduler.step_index == 2
    assert torch.equal(stepped, x - 0.5)
    assert scheduler.step(u.bfloat16(), 500, x.bfloat16()).prev_sample.dtype == torch.bfloat16
    assert torch.equal(scheduler.scale_model_input(x, 500), x)
    t, noise = torch.tensor([0.0, 250.0]), torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), FlowSchedule().add_noise(x, noise, t))
    scheduler.set_timesteps(timesteps=[1000, 300])
    assert scheduler.end_timesteps.tolist() == [300, 0]
    for wrong in (dict(), dict(num_inference_steps=0), dict(timesteps=[300, 1000]), dict(timesteps=[]),
                  dict(num_inference_steps=2, timesteps=[1000])):
        with pytest.raises(ValueError, match=r"steps|timesteps"):
            scheduler.set_timesteps(**wrong)
    with pytest.raises(ValueError, match="no step begins at timestep 7"):
        scheduler.index_for_timestep(7)


def test_other_samplers_are_refused_by_name():
    check_scheduler(FlowMapScheduler(), "flow-map")
    with pytest.raises(ValueError, match="sampler 'flow-euler' is for flow models.*use flow-map"):
        make_scheduler("flow-euler", "flow-map")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is for models of flow"):
        check_scheduler(make_scheduler("flow-euler", "flow"), "flow-map")
    with pytest.raises(ValueError, match="FlowMapScheduler is for models of flow-map"):
        check_scheduler(FlowMapScheduler(), "flow")


def test_image_to_image_begins_on_the_path():
    scheduler = make_scheduler("flow-map", "flow-map", 4)
    set_steps(scheduler, 4)
    start, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    seen = []

    def predict(x, t):
        seen.append((float(t[0]), float(x.mean())))
        return torch.zeros_like(x)

    x0 = denoise(predict, scheduler, noise, first=3, start=start)
    assert seen == [(250.0, 0.25)]
    assert torch.equal(x0, 0.25 * noise)
