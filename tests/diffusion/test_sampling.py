"""Samplers against the exact solution for normal data, guidance, image-to-image and inpainting, training timesteps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from lamamba.diffusion.denoise import (
    SAMPLERS,
    Known,
    check_scheduler,
    denoise,
    first_step,
    make_scheduler,
    respaced_steps,
    set_steps,
)
from lamamba.diffusion.guidance import Guidance, drop_labels, guided
from lamamba.diffusion.schedule import FlowSchedule, NoiseSchedule

MEAN, DEVIATION = 0.7, 0.2


def level(t):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at times (b,), interpolated between whole ones."""
    alpha_bar = NoiseSchedule().alphas_cumprod
    sigmas = np.interp(t.numpy(), np.arange(1000), ((1 - alpha_bar) / alpha_bar).sqrt().numpy())
    alpha = torch.from_numpy((1 + sigmas**2) ** -0.5).view(-1, 1, 1, 1).float()
    return alpha, (1 - alpha**2).sqrt()


def exact_noise_predictor(x, t):
    """E[eps | xt] for data of normal(MEAN, DEVIATION), then the variance channels, 0."""
    alpha, sigma = level(t)
    eps = sigma * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def exact_velocity(x, t):
    """E[eps - x0 | xt] on the straight line from the same data."""
    share = (t / 1000).view(-1, 1, 1, 1).float()
    total = (1 - share) ** 2 * DEVIATION**2 + share**2
    surprise = (x - (1 - share) * MEAN) / total
    return share * surprise - (MEAN + (1 - share) * DEVIATION**2 * surprise)


def exact_v_predictor(x, t):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, both from E[eps | xt]."""
    alpha, sigma = level(t)
    eps = exact_noise_predictor(x, t)[:, : x.shape[1]]
    return alpha * eps - sigma * (x - sigma * eps) / alpha


PREDICTORS = {
    "noise": exact_noise_predictor, "v": exact_v_predictor, "flow": exact_velocity,
    "flow-map": exact_velocity,                                                 # of r = t; exact maps: test_flow_map.py
}
PAIRS = [(name, objective) for name, sampler in SAMPLERS.items() for objective in sampler.objectives]
DETERMINISTIC = [(name, objective) for name, objective in PAIRS if not SAMPLERS[name].is_stochastic]


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_samples_follow_the_data(name, objective):
    """Mean and deviation of 20,000 numbers sampled with the exact predictor are the data's."""
    noise = torch.randn(4, 1, 50, 100, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    x0 = denoise(PREDICTORS[objective], make_scheduler(name, objective, 250), noise, generators=generators)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x0.std()) == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_an_image_depends_on_its_own_generator_alone(name, objective):
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        scheduler = make_scheduler(name, objective, 8)
        return denoise(PREDICTORS[objective], scheduler, noise[rows], generators=generators)

    torch.testing.assert_close(run([0, 1, 2])[2], run([2])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "objective"), DETERMINISTIC)
def test_deterministic_samplers_reach_the_solution_of_the_flow(name, objective):
    """For normal data the probability-flow ODE keeps each number's quantile: x0 = mean + deviation * (normal score)."""
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for num_steps in (25, 250):
        scheduler = make_scheduler(name, objective, num_steps)
        if objective == "flow":
            sigma = scheduler.sigmas[0]                                         # diffusers begins some at 0.999
            alpha = 1 - sigma
        else:
            alpha, sigma = level(scheduler.timesteps[:1].float())
        solution = MEAN + DEVIATION * (noise - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
        errors.append(float((denoise(PREDICTORS[objective], scheduler, noise) - solution).abs().max()))
    # ten times the steps: a tenth of the error for the first order, less for the second
    assert errors[1] <= 0.03, errors
    assert errors[1] < max(errors[0] / 7, 1e-3), errors


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_flow_samplers_take_steps_of_one_length(num_steps):
    """Euler's and Heun's rules written out, on times 1, 1 - 1/N, ..., 0."""
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times, h = [1 - k / num_steps for k in range(num_steps + 1)], 1 / num_steps
    euler, heun = noise.clone(), noise.clone()
    for time, following in zip(times, times[1:], strict=False):
        euler = euler - h * exact_velocity(euler, torch.tensor([1000 * time]))
        slope = exact_velocity(heun, torch.tensor([1000 * time]))
        if following > 1e-6:                                                    # the last step is one of Euler's
            slope = (slope + exact_velocity(heun - h * slope, torch.tensor([1000 * following]))) / 2
        heun = heun - h * slope
    for name, expected in (("flow-euler", euler), ("flow-heun", heun)):
        found = denoise(exact_velocity, make_scheduler(name, "flow", num_steps), noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_fewest_and_most_steps_are_finite(name, objective, most):
    sampler = SAMPLERS[name]
    for num_steps in (sampler.max_steps,) if most else (sampler.min_steps, sampler.min_steps + 1):
        generators = [torch.Generator().manual_seed(0)]
        x0 = denoise(
            PREDICTORS[objective], make_scheduler(name, objective, num_steps), torch.ones(1, 1, 2, 2),
            generators=generators,
        )
        assert x0.isfinite().all(), num_steps
        assert x0.abs().max() < 10, num_steps


def test_every_step_reports_the_predicted_clean_image():
    """With the exact predictor it converges to the clean image, for every sampler."""
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name, objective in PAIRS:
        seen = []
        generators = [torch.Generator().manual_seed(0)]
        scheduler = make_scheduler(name, objective, 40)
        x0 = denoise(PREDICTORS[objective], scheduler, noise, generators=generators, on_step=seen.append)
        total = len(scheduler.timesteps)
        assert [(step.done, step.total) for step in seen] == [(i, total) for i in range(1, total + 1)]
        assert [float(step.timestep) for step in seen] == scheduler.timesteps.tolist()
        assert torch.equal(seen[-1].x, x0)
        # from the mean to the image
        assert float((seen[0].x0 - MEAN).abs().max()) < 0.05, name
        assert float((seen[-1].x0 - x0).abs().max()) < 0.02, name


def test_on_step_can_replace_x_and_sampling_be_interrupted():
    scheduler = make_scheduler("ddim", "noise", 5)
    ones = torch.ones(1, 1, 2, 2)
    assert torch.equal(denoise(exact_noise_predictor, scheduler, 0 * ones, on_step=lambda step: ones), ones)
    seen = []
    denoise(
        exact_noise_predictor, make_scheduler("ddim", "noise", 5), torch.zeros(1, 1, 2, 2), on_step=seen.append,
        interrupted=lambda: len(seen) == 2,
    )
    assert len(seen) == 2


@pytest.mark.parametrize(("name", "objective", "steps", "said"), [
    ("flow-euler", "noise", 5, "use ddpm or ddim or dpm"),
    ("ddpm", "flow", 5, "use flow-euler or flow-heun"),
    ("dpm+++", "noise", 5, r"did you mean 'dpm\+\+'"),
    ("ddpm", "noise", 1, "takes 2 to 1000 steps, not 1"),
    ("ddim", "noise", 1001, "not 1001"),
])
def test_samplers_that_do_not_fit_raise_with_those_that_do(name, objective, steps, said):
    with pytest.raises(ValueError, match=said):
        make_scheduler(name, objective, steps)


def test_any_number_of_ancestral_steps_has_both_ends():
    for num_steps in range(2, 300):
        steps = respaced_steps(num_steps)
        assert (steps[0], steps[-1], len(set(steps))) == (999, 0, num_steps)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Table:
    """A model with a random output of its own for each label; counts its images."""

    def __init__(self, seed=0, channels=8):
        self.outputs, self.images = images(6, channels, 4, 4, seed=seed), 0

    def __call__(self, x, t, labels):
        self.images += len(x)
        return self.outputs[labels if labels is not None else torch.zeros(len(x), dtype=torch.int64)]


X, LABELS = torch.zeros(2, 4, 4, 4), torch.tensor([0, 2])


def at(time):
    return torch.full((2,), float(time))


def test_guidance_is_linear_on_the_prediction_and_leaves_the_variance_alone():
    model = Table()
    output = guided(model, LABELS, 3.0, num_classes=5)(X, at(500))
    null, cond = model.outputs[5], model.outputs[LABELS]
    torch.testing.assert_close(output[:, :4], null[:4] + 3 * (cond[:, :4] - null[:4]))
    assert torch.equal(output[:, 4:], cond[:, 4:])
    assert model.images == 4


def test_scale_one_costs_one_evaluation():
    model = Table()
    guided(model, LABELS, 1.0, num_classes=5)(X, at(500))
    assert model.images == 2


def test_guiding_the_first_three_channels_leaves_the_others_conditional():
    model = Table()
    every = guided(model, LABELS, Guidance(3.0), 5)(X, at(500))
    some = guided(model, LABELS, Guidance(3.0, channels="first-three"), 5)(X, at(500))
    torch.testing.assert_close(some[:, :3], every[:, :3])
    assert torch.equal(some[:, 3:], model.outputs[LABELS][:, 3:])
    assert not torch.allclose(some[:, 3], every[:, 3])


@pytest.mark.parametrize(("time", "count"), [(0, 2), (299, 2), (300, 4), (600, 4), (800, 4), (801, 2), (999, 2)])
def test_outside_of_its_interval_guidance_costs_one_evaluation(time, count):
    model = Table()
    output = guided(model, LABELS, Guidance(3.0, interval=(0.3, 0.8)), 5)(X, at(time))
    assert model.images == count
    assert torch.equal(output, model.outputs[LABELS]) == (count == 2)


def test_rescaled_guidance_has_the_conditional_predictions_deviation():
    model = Table()
    plain, part, whole = (
        guided(model, LABELS, Guidance(4.0, rescale=share), 5)(X, at(500)) for share in (0.0, 0.3, 1.0)
    )
    cond = model.outputs[LABELS]
    for k in range(2):
        assert float(whole[k, :4].std()) == pytest.approx(float(cond[k, :4].std()), rel=1e-5)
        assert np.corrcoef(whole[k, :4].flatten(), plain[k, :4].flatten())[0, 1] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(part[:, :4], 0.3 * whole[:, :4] + 0.7 * plain[:, :4])
    assert torch.equal(whole[:, 4:], cond[:, 4:])


@pytest.mark.parametrize("num_classes", [5, 0])
def test_autoguidance_extrapolates_from_the_guiding_model_with_the_same_labels(num_classes):
    model, guiding_model = Table(0), Table(1, channels=4)
    labels = LABELS if num_classes else None
    output = guided(model, labels, Guidance(2.0), num_classes, guiding_model=guiding_model)(X, at(500))
    rows = LABELS if num_classes else torch.tensor([0, 0])
    strong, weak = model.outputs[rows], guiding_model.outputs[rows]
    torch.testing.assert_close(output[:, :4], 2 * strong[:, :4] - weak)
    assert torch.equal(output[:, 4:], strong[:, 4:])
    assert (model.images, guiding_model.images) == (2, 2)
    guided(model, labels, Guidance(1.0), num_classes, guiding_model=guiding_model)(X, at(500))
    assert (model.images, guiding_model.images) == (4, 2)


@pytest.mark.parametrize(("settings", "said"), [
    (dict(scale=float("nan")), "no finite number"),
    (dict(scale=10**400), "no finite number"),
    (dict(channels="first"), "unknown; did you mean 'first-three'"),
    (dict(interval=(0.5, 0.2)), "0 <= low <= high <= 1"),
    (dict(interval=(0, 500)), "0 <= low <= high <= 1"),
    (dict(rescale=2.0), "0 .off. .. 1"),
])
def test_invalid_guidance_raises(settings, said):
    with pytest.raises(ValueError, match=said):
        Guidance(**settings)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_image_to_image_keeps_more_of_the_image_the_later_it_starts(name, objective):
    """The later the start, the closer the result; from the last steps it is near the image itself."""
    clean = MEAN + DEVIATION * images(2, 1, 16, 16, seed=5)
    noise = images(2, 1, 16, 16)
    distances = []
    for share in (1.0, 0.3, 0.05):
        scheduler = make_scheduler(name, objective, 40)
        first = first_step(scheduler, share)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        x0 = denoise(PREDICTORS[objective], scheduler, noise, generators=generators, first=first, start=clean)
        assert float(x0.mean()) == pytest.approx(MEAN, abs=0.05)
        distances.append(float((x0 - clean).abs().mean()))
    assert distances[0] > distances[1] > 1.5 * distances[2], distances
    assert distances[2] < 0.15, distances


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_inpainting_keeps_the_known_part_and_samples_the_rest(name, objective):
    clean = MEAN + DEVIATION * images(1, 1, 32, 32, seed=5)
    repaint = torch.zeros(1, 1, 32, 32)
    repaint[..., 16:] = 1
    generators = [torch.Generator().manual_seed(0)]
    x0 = denoise(
        PREDICTORS[objective], make_scheduler(name, objective, 50), images(1, 1, 32, 32), generators=generators,
        known=Known(clean, repaint),
    )
    torch.testing.assert_close(x0[..., :16], clean[..., :16])
    assert float(x0[..., 16:].mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x0[..., 16:].std()) == pytest.approx(DEVIATION, abs=0.05)


def test_known_parts_have_the_noise_level_of_each_step():
    """With an empty mask, x is the known image at the scheduler's level in every step."""
    clean, noise = images(1, 1, 4, 4, seed=5), images(1, 1, 4, 4)
    for name, objective in PAIRS:
        scheduler, seen = make_scheduler(name, objective, 6), []
        denoise(
            PREDICTORS[objective], scheduler, noise, generators=[torch.Generator().manual_seed(0)],
            known=Known(clean, torch.zeros(1, 1, 4, 4)), on_step=seen.append,
        )
        for step, following in zip(seen[:-1], scheduler.timesteps[1:], strict=True):
            x = step.x / (1 + scheduler.sigmas[step.done] ** 2).sqrt() if name in ("euler", "heun") else step.x
            is_flow = objective in ("flow", "flow-map")
            alpha, sigma = (1 - following / 1000, following / 1000) if is_flow else level(following[None])
            torch.testing.assert_close(x, alpha * clean + sigma * noise, rtol=1e-3, atol=2e-3, msg=name)
        assert torch.equal(seen[-1].x, clean)


def test_strength_is_the_share_of_steps():
    for name, objective in PAIRS:
        for strength, steps in ((1.0, 10), (0.5, 5), (0.31, 3), (0.01, 1)):
            scheduler = make_scheduler(name, objective, 10)
            evaluations = 2 * steps - 1 if "heun" in name else steps
            assert len(scheduler.timesteps) - first_step(scheduler, strength) == evaluations, name
    for strength in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            first_step(scheduler, strength)


def test_a_first_step_needs_start():
    with pytest.raises(ValueError, match="first=3 must lie in 0 .. 5, and needs start="):
        denoise(exact_noise_predictor, make_scheduler("ddim", "noise", 5), torch.zeros(1, 1, 2, 2), first=3)


BETAS = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize(("scheduler", "objective", "said"), [
    (FlowMatchEulerDiscreteScheduler(), "noise", "is for models of flow.*use ddpm or ddim"),
    (DDIMScheduler(**BETAS), "flow", "is for models of noise.*use flow-euler"),
    (DDIMScheduler(**BETAS), "v", "is for models of noise, this one was trained for v"),
    (DDIMScheduler(**BETAS, prediction_type="sample"), "noise", "is for models of sample"),
    (DDIMScheduler(beta_schedule="scaled_linear"), "noise", "other noise levels"),
    (DDIMScheduler(**BETAS, num_train_timesteps=500), "noise", "num_train_timesteps=500, not 1000"),
    (EDMEulerScheduler(), "noise", "other noise levels"),
])
def test_a_scheduler_that_does_not_fit_raises(scheduler, objective, said):
    with pytest.raises(ValueError, match=said):
        check_scheduler(scheduler, objective)


@pytest.mark.parametrize("kind", [
    EulerAncestralDiscreteScheduler, DEISMultistepScheduler, DPMSolverSinglestepScheduler, LMSDiscreteScheduler,
    KDPM2DiscreteScheduler, PNDMScheduler,
])
def test_other_schedulers_of_diffusers_sample_the_data(kind):
    scheduler = kind(**BETAS)
    check_scheduler(scheduler, "noise")
    set_steps(scheduler, 100)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    x0 = denoise(exact_noise_predictor, scheduler, images(4, 1, 20, 20), generators=generators)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x0.std()) == pytest.approx(DEVIATION, abs=0.05)


def test_every_sampler_fits_its_objectives():
    for name, objective in PAIRS:
        check_scheduler(make_scheduler(name, objective), objective)


def test_guiding_an_unconditional_model_raises():
    assert guided(Table(), None, 1.0, 0)(X, at(500)).shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="needs a class-conditional model"):
        guided(Table(), None, 2.0, 0)
    with pytest.raises(ValueError, match="takes no labels"):
        guided(Table(), torch.tensor([0]), 1.0, 0)
    with pytest.raises(ValueError, match="give labels"):
        guided(Table(), None, 2.0, 5)


def test_labels_are_dropped_with_the_given_probability():
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    labels = drop_labels(torch.full((20_000,), 3), uniform, 0.1, null_label=7)
    assert set(labels.tolist()) == {3, 7}
    assert float((labels == 7).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_default_distributions_of_timesteps():
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = NoiseSchedule().timestep(uniform)
    assert (int(steps.min()), int(steps.max())) == (0, 999)
    assert float(steps.float().mean()) == pytest.approx(499.5, abs=5)
    times = FlowSchedule().timestep(uniform)
    logits = torch.logit(times.double() / 1000)
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(1, abs=0.02)
    assert FlowSchedule().timestep(torch.tensor([0.0, 1.0])).isfinite().all()


def test_flow_adds_noise_along_a_straight_line():
    x0, eps = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -1.0)
    xt = FlowSchedule().add_noise(x0, eps, torch.tensor([0.0, 500.0, 1000.0]))
    assert xt[:, 0, 0, 0].tolist() == [2.0, 0.5, -1.0]
