"""Scores: the output's change without each unit, resumable, the same by any number of processes."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch

from lamamba.compression import calibration as calibrations
from lamamba.compression.additivity import measure_sets, rank_correlation, relative_loss
from lamamba.compression.calibration import from_data, from_sampling
from lamamba.compression.find import find_units
from lamamba.compression.job import score_in_folder
from lamamba.compression.scores import RULES, energy_of, score
from lamamba.data.digits import Digits
from lamamba.data.sets import PixelSet
from lamamba.options.compress import Criterion
from tests.networks import random_network, small_config

REMOVED = ("encoder.1.0", "encoder.2.0", "encoder.3.0", *(f"decoder.{s}.{k}" for s in range(3) for k in range(2)))
CONFIG = small_config(depths=(1, 1, 1, 1), in_channels=1, num_classes=10, grid=8, removed_blocks=REMOVED)
"""Few units, for the time of a test."""
DATA = PixelSet(Digits(8), False)


@pytest.fixture(scope="module")
def network():
    return find_units(random_network(CONFIG).eval())


@pytest.fixture(scope="module")
def calibration(network):
    return from_data(network.model, DATA, samples=6, batch_size=4)


@pytest.fixture(scope="module")
def scores(network, calibration):
    return score(network, calibration)


def test_scores_are_the_squared_change_of_the_output(network, calibration, scores):
    name = "decoder.3.0.scan"
    pruned = network.without([name])
    outputs = [(whole, pruned(**batch.inputs)) for whole, batch in zip(
        calibration.predictions(network.model), calibration.batches, strict=True
    )]
    each = torch.cat([(a - b[:, :1].detach()).square().flatten(1).mean(1) for a, b in outputs]).double()
    assert scores.predicted([name]) == pytest.approx(float(each.mean()), rel=1e-5)
    assert scores.errors[scores.index([name])[0]] == pytest.approx(float(each.std()) / len(each) ** 0.5, rel=1e-4)


def test_cross_terms_of_one_unit_are_its_score(scores):
    assert np.diag(scores.products) == pytest.approx(scores.values, rel=1e-5)
    assert scores.products == pytest.approx(scores.products.T)


def test_bins_over_time_average_to_the_score(calibration, scores):
    counts = np.histogram(calibration.times.numpy(), bins=10, range=(0, 1000))[0]
    means = np.nansum(np.nan_to_num(scores.bins) * counts, axis=1) / counts.sum()
    assert means == pytest.approx(scores.values, rel=1e-5)


def test_the_learned_variance_does_not_count(calibration, network):
    assert network.model.architecture.output_channels == 2
    assert calibration.channels == 1
    assert all(output.shape[1] == 1 for output in calibration.predictions(network.model))


def test_the_batch_size_changes_nothing_but_rounding(network, scores):
    other = score(network, from_data(network.model, DATA, samples=6, batch_size=6))
    assert other.values == pytest.approx(scores.values, rel=1e-4)


def test_a_stopped_scoring_goes_on_to_the_same_scores(network, calibration, scores, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.done == 3:
            raise Stop

    with pytest.raises(Stop):
        score_in_folder(network, calibration, tmp_path / "s", report=stop)
    seen = []
    made = score_in_folder(network, calibration, tmp_path / "s", report=seen.append)
    assert seen[0].resumed == 3
    assert seen[-1].unit == "units"
    assert made.values == pytest.approx(scores.values, rel=1e-6)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["scores.json"]
    again = score_in_folder(network, calibration, tmp_path / "s")
    assert again.to_json() == made.to_json()
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        score_in_folder(network, from_data(network.model, DATA, samples=6, seed=1), tmp_path / "s")


def test_states_of_sampling_serve_where_there_is_no_data(network):
    states = from_sampling(network.model, samples=6, batch_size=4, steps=5)
    found = score(network, states)
    assert np.isfinite(found.values).all()
    assert len(set(states.times.tolist())) > 1
    with pytest.raises(ValueError, match="needs data"):
        score(network, states, criterion="task")
    with pytest.raises(ValueError, match="no step of"):
        from_sampling(network.model, samples=2, times=(999.5, 999.6), steps=5)


@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_every_criterion_scores_every_unit(network, calibration, criterion):
    found = score(network, calibration, criterion=criterion, seed=3)
    assert len(found.values) == len(network.units)
    assert not np.isnan(found.values).any()
    assert found.to_json() == score(network, calibration, criterion=criterion, seed=3).to_json()
    if criterion in RULES:
        assert found.products is None


def test_a_task_score_is_the_change_of_the_training_loss(network, calibration):
    found = score(network, calibration, criterion="task")
    name = "encoder.0.0.mlp"
    losses = []
    for model in (network.without([name]), network.model):
        outputs = [model(**batch.inputs) for batch in calibration.batches]
        losses.append(torch.cat([b.loss(o) for b, o in zip(calibration.batches, outputs, strict=True)]).mean())
    assert found.predicted([name]) == pytest.approx(float(losses[0] - losses[1]), rel=1e-3)


def test_data_of_another_size_or_class_count_is_refused(network):
    with pytest.raises(ValueError, match="give the data of its training"):
        from_data(network.model, PixelSet(Digits(16), False))
    with pytest.raises(ValueError, match="10 classes, the network 7"):
        from_data(random_network(small_config(in_channels=1, num_classes=7, grid=8)), DATA)


def test_a_network_that_is_not_finite_is_refused(calibration):
    broken = random_network(CONFIG)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite on the calibration set"):
        score(find_units(broken), calibration)


def test_a_set_is_measured_as_the_pruned_network(network, calibration):
    names = ["bottleneck", "decoder.3.1.mlp"]
    whole, pruned = (calibration.predictions(model) for model in (network.model, network.without(names)))
    expected = energy_of([a - b for a, b in zip(pruned, whole, strict=True)]) / energy_of(whole)
    assert relative_loss(network, names, calibration) == pytest.approx(expected)


def test_sets_are_measured_half_sensible_half_random(network, scores, calibration):
    sets = list(measure_sets(network, scores, calibration, sets=6))
    assert list(measure_sets(network, scores, calibration, sets=6, first=4)) == sets[4:]
    assert [each.kind for each in sets] == ["sensible", "random"] * 3
    assert all(each.share >= 0.05 for each in sets)
    assert -1 <= rank_correlation(sets) <= 1
    assert json.dumps([each.measured for each in sets])


def test_the_default_is_a_tenth_without_label(network):
    calibration = from_data(network.model, DATA, samples=200)
    labels = torch.cat([batch.inputs["class_labels"] for batch in calibration.batches])
    assert 0.03 < (labels == 10).float().mean() < 0.2
    assert calibrations.LABEL_DROPOUT == 0.1
