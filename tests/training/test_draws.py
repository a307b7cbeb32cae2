"""Random numbers depend on the seed and on the sample's position in the run, on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.training.draws import draw, image_indices

SHAPE = (2, 4, 4)


def test_a_sample_has_its_numbers_wherever_it_is_drawn():
    together = draw(7, range(100, 116), SHAPE)
    alone = draw(7, [109], SHAPE)
    assert torch.equal(together.eps[9], alone.eps[0])
    assert (together.time[9], together.label[9], together.mirror[9]) == (alone.time[0], alone.label[0], alone.mirror[0])
    assert not torch.equal(draw(8, [109], SHAPE).eps, alone.eps)
    assert not torch.equal(draw(7, [110], SHAPE).eps, alone.eps)


def test_numbers_are_well_distributed():
    draws = draw(0, range(4000), SHAPE)
    for uniform in (draws.time, draws.label):
        assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert draws.mirror.mean() == pytest.approx(0.5, abs=0.03)
    assert float(draws.eps.mean()) == pytest.approx(0, abs=0.01)
    assert float(draws.eps.std()) == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(draws.time, draws.label)[0, 1]) < 0.05


def test_every_epoch_shows_every_image_once_in_a_new_order():
    first, second = image_indices(3, range(10), 10), image_indices(3, range(10, 20), 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert image_indices(3, range(5, 15), 10) == first[5:] + second[:5]         # a batch over the epoch's edge
    assert image_indices(4, range(10), 10) != first
