"""Image k depends on seed k alone, and bad requests are refused before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.data.codec import to_uint8
from lamamba.diffusion.guidance import Guidance
from lamamba.sampling import generate
from lamamba.sampling.generate import noise_of
from lamamba.sampling.settings import Interpolated
from tests.networks import grey_network, largest_difference


@pytest.mark.parametrize(("objective", "sampler", "guidance"), [
    ("flow", "flow-euler", 2.0), ("flow", "flow-heun", 2.0), ("noise", "ddpm", 2.0), ("noise", "ddim", 2.0),
    ("noise", "dpm++", 2.0), ("noise", "ddpm", Guidance(2.0, interval=(0.1, 0.9), rescale=0.3)),
])
def test_an_image_depends_on_its_seed_and_label_alone(objective, sampler, guidance):
    model = grey_network(objective=objective)
    labels, seeds = [0, 1, 2, 0, 1], [5, 6, 7, 8, 9]
    settings = dict(sampler=sampler, num_steps=4, guidance=guidance)
    together = generate(model, labels, seeds, **settings)
    assert together.shape == (5, 8, 8, 1)
    assert together.dtype == np.uint8
    assert np.ptp(together) > 10
    for batch_size in (1, 3):
        apart = generate(model, labels, seeds, batch_size=batch_size, **settings)
        assert largest_difference(apart, together) <= 1
    shuffled = generate(model, labels[::-1], seeds[::-1], **settings)
    assert largest_difference(shuffled[::-1], together) <= 1
    assert not np.array_equal(generate(model, labels, [s + 100 for s in seeds], **settings), together)


def test_progress_covers_all_batches():
    model = grey_network()
    seen = []
    generate(model, [0] * 3, range(3), num_steps=2, batch_size=2, on_step=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_unconditional_models_take_no_labels():
    model = grey_network(num_classes=0)
    assert generate(model, None, [0, 1], num_steps=2).shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="unconditional"):
        generate(model, [0], [0], num_steps=2)
    with pytest.raises(ValueError, match="needs a class-conditional model"):
        generate(model, None, [0], num_steps=2, guidance=2.0)


@pytest.mark.parametrize(("changes", "said"), [
    (dict(labels=[0, 3]), "label 3 is out of range; this model knows 0 .. 2"),
    (dict(labels=[0]), "1 labels came with 2 seeds"),
    (dict(labels=None), "class-conditional: give labels"),
    (dict(seeds=[]), "no seeds were given"),
    (dict(seeds=[0, 2**63]), "seed 9223372036854775808 is out of range; seeds are 0 .. 9223372036854775807"),
    (dict(seeds=[Interpolated(-1, 2, 0.5), 0]), "seed -1 is out of range"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(sampler="ddpm"), "use flow-euler or flow-heun"),
])
def test_bad_requests(changes, said):
    model = grey_network()
    with pytest.raises(ValueError, match=said):
        generate(model, **{"labels": [0, 1], "seeds": [0, 1], "num_steps": 2, **changes})


def test_sampling_leaves_the_global_random_state_alone():
    model = grey_network(objective="noise")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(model, [0], [0], sampler="ddpm", num_steps=3)
    assert torch.equal(before, torch.get_rng_state())


def test_between_two_seeds_lie_normal_noises():
    shape = (4, 32, 32)
    first, second = noise_of(3, shape), noise_of(7, shape)
    assert torch.equal(noise_of(Interpolated(3, 7, 0.0), shape), first)
    assert torch.equal(noise_of(Interpolated(3, 7, 1.0), shape), second)
    assert torch.equal(noise_of(Interpolated(3, 3, 0.4), shape), first)
    middle = noise_of(Interpolated(3, 7, 0.5), shape)
    torch.testing.assert_close(middle, (first + second) / (2 + 2 * torch.cosine_similarity(
        first.flatten(), second.flatten(), dim=0)).sqrt(), atol=0.02, rtol=0.02)
    for weight in (0.1, 0.3, 0.5):
        noise = noise_of(Interpolated(3, 7, weight), shape)
        assert abs(float(noise.std()) - 1) < 0.03                               # a straight line would have 0.71
        to_first, to_second = (torch.nn.functional.cosine_similarity(noise.flatten(), end.flatten(), dim=0)
                               for end in (first, second))
        whole = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).acos()
        torch.testing.assert_close(to_first.acos(), weight * whole, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(to_second.acos(), (1 - weight) * whole, atol=1e-3, rtol=1e-3)


def test_between_two_classes_lie_their_embeddings():
    model = grey_network()
    settings = dict(num_steps=3, guidance=2.0)
    labels = [Interpolated(0, 2, w) for w in (0.0, 0.25, 1.0)]
    walk = generate(model, [*labels, 1], [4, 4, 4, 4], **settings)
    assert largest_difference(walk[[0, 2, 3]], generate(model, [0, 2, 1], [4, 4, 4], **settings)) <= 1
    with torch.no_grad():                                                       # a table whose row 1 is the mixture
        table = model.label_embedding.weight
        table[1] = 0.75 * table[0] + 0.25 * table[2]
    assert largest_difference(generate(model, [1], [4], **settings)[0], walk[1]) <= 1


def test_other_sizes_and_back():
    model = grey_network()
    before = generate(model, [0], [1], num_steps=2)
    wide = generate(model, [0, 1], [1, 2], num_steps=2, input_size=(8, 12))
    assert wide.shape == (2, 8, 12, 1)
    model.set_grid((8, 12))                                                     # the network's own way
    x = noise_of(1, (1, 8, 12))[None]
    assert model(x, torch.tensor([5.0]), torch.tensor([0])).shape == x.shape
    model.set_grid(None)
    np.testing.assert_array_equal(generate(model, [0], [1], num_steps=2), before)
    assert model.architecture.fit_input(None, 12, 1) == (8, 12)
    assert model.architecture.fit_input(64, 96, 8) == (8, 12)
    with pytest.raises(ValueError, match="height 100 does not fit this model: .* 32 pixels; the nearest is 96 or 128"):
        model.architecture.fit_input(100, None, 8)
    with pytest.raises(ValueError, match="width 3 does not fit.*the nearest is 4"):
        model.architecture.fit_input(None, 3, 1)


def test_guided_by_a_guiding_model():
    model = grey_network()
    guiding_model = grey_network(1)
    plain = generate(model, [0, 1], [1, 2], num_steps=2)
    unguided = generate(model, [0, 1], [1, 2], num_steps=2, guiding_model=guiding_model)
    np.testing.assert_array_equal(unguided, plain)
    output = generate(model, [0, 1], [1, 2], num_steps=2, guidance=2.0, guiding_model=guiding_model)
    assert not np.array_equal(output, plain)
    stranger = grey_network(objective="noise")
    with pytest.raises(ValueError, match="guiding model has objective='noise'"):
        generate(model, [0], [1], num_steps=2, guidance=2.0, guiding_model=stranger)


def test_no_path_between_seeds_where_noise_is_drawn_on_the_way():
    model = grey_network(objective="noise")
    with pytest.raises(ValueError, match="no path between two seeds; use ddim"):
        generate(model, [0], [Interpolated(1, 2, 0.5)], sampler="ddpm", num_steps=2)


def test_a_watcher_sees_every_step_of_every_batch():
    model = grey_network()
    seen = []
    images = generate(model, [0] * 3, range(3), num_steps=2, batch_size=2,
                      preview=lambda places, step, x0: seen.append((places, step, to_uint8(x0))))
    assert [(list(places), step) for places, step, _ in seen] == [([0, 1], 1), ([0, 1], 2), ([2], 1), ([2], 2)]
    np.testing.assert_array_equal(seen[1][2], images[:2])                       # the last step ends where x0 was seen
