"""Distillation losses against their formulas."""

from __future__ import annotations

import pytest
import torch

from lamamba.diffusion.distillation import feature_losses, output_loss


def features(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(3, *shape, generator=generator) for shape in ((4, 4, 8), (2, 2, 16))]


def test_the_output_loss_is_the_mean_squared_difference():
    a, b = features(0)[0], features(1)[0]
    assert output_loss(a, b) == pytest.approx(torch.stack([(x - y).square().mean() for x, y in zip(a, b, strict=True)]))


def test_normalised_features_weigh_alike_whatever_their_scale():
    student, teacher = features(0), features(1)
    losses = feature_losses(student, teacher)
    assert losses.shape == (2, 3)
    for s, t, loss in zip(student, teacher, losses, strict=True):
        for k in range(3):
            assert float(loss[k]) == pytest.approx(float((s[k] - t[k]).norm() ** 2 / t[k].norm() ** 2), rel=1e-5)
    scaled = feature_losses([student[0], 1000 * student[1]], [teacher[0], 1000 * teacher[1]])
    assert torch.allclose(scaled, losses, rtol=1e-5)


def test_plain_features_are_means():
    student, teacher = features(0), features(1)
    expected = torch.stack([(s - t).square().flatten(1).mean(1) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(feature_losses(student, teacher, "plain"), expected)


def test_a_sample_does_not_depend_on_its_batch():
    student, teacher = features(0), features(1)
    alone = feature_losses([s[1:2] for s in student], [t[1:2] for t in teacher])
    assert torch.allclose(feature_losses(student, teacher)[:, 1:2], alone)


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"feature 1 is \(3, 2, 2, 8\) in the student"):
        feature_losses([torch.zeros(3, 4, 4, 8), torch.zeros(3, 2, 2, 8)], features(0))


def test_features_of_zero_norm_are_finite():
    assert feature_losses([torch.zeros(1, 2)], [torch.zeros(1, 2)]).item() == 0
