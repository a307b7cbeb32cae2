"""Training with a teacher: the same in one piece and resumed, known by its hash, every term logged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lamamba.models.unet import LaMambaUNet
from lamamba.training.loop import describe, train
from tests.training.test_processes import assert_two_processes_make_the_same_run
from tests.training.together import FewDigits, config, losses_of, read_lines, save_teacher


@pytest.fixture(scope="module")
def data():
    return FewDigits(8)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), data)


def test_a_run_of_its_teachers_weights_has_no_distance_to_it(data, teacher, tmp_path):
    train(config(distill=dict(teacher=str(teacher)), start=dict(source=str(teacher)), steps=1), data, tmp_path / "run")
    line = read_lines(tmp_path / "run")[0]
    assert max(line["output_loss"], line["feature_loss"]) < 1e-10            # kernels differ with gradients
    assert line["loss"] == pytest.approx(line["task_loss"])


@pytest.mark.parametrize("features", ["normalised", "plain", "none"])
def test_the_loss_is_the_weighted_sum_of_its_terms(data, teacher, tmp_path, features):
    options = dict(teacher=str(teacher), task=0.5, output=2.0, feature=0.25, features=features, stages=["decoder.3"])
    train(config(distill=options, watch=dict(held_out=2)), data, tmp_path / "run")
    for line in read_lines(tmp_path / "run"):
        expected = 0.5 * line["task_loss"] + 2 * line["output_loss"] + 0.25 * line.get("feature_loss", 0.0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert ("feature_loss" in line) == (features != "none")
    assert {"held_out_loss", "held_out_task_loss", "held_out_output_loss"} <= read_lines(tmp_path / "run")[-1].keys()


def test_a_distillation_resumes_to_the_bit(data, teacher, tmp_path):
    run = config(distill=dict(teacher=str(teacher)), processes=dict(accumulation_steps=2))
    whole = train(run, data, tmp_path / "whole")
    train(dataclasses.replace(run, steps=2), data, tmp_path / "parts")
    parts = train(run, data, tmp_path / "parts")
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_make_the_same_run(teacher, tmp_path, sharding):
    """The teacher is whole on each."""
    settings = config(distill=dict(teacher=str(teacher)), optimizer=dict(learning_rate=1e-3))
    assert_two_processes_make_the_same_run(settings, sharding, tmp_path)


def test_another_teacher_is_refused_on_resume(data, teacher, tmp_path):
    run = config(distill=dict(teacher=str(teacher)))
    train(dataclasses.replace(run, steps=2), data, tmp_path / "run")
    other = LaMambaUNet.from_pretrained(teacher)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "sampling.json").write_bytes((teacher / "sampling.json").read_bytes())
    with pytest.raises(ValueError, match=r"teacher\.sha256"):
        train(config(distill=dict(teacher=str(tmp_path / "other"))), data, tmp_path / "run")


def test_a_teacher_that_does_not_fit_is_refused(data, teacher, tmp_path):
    with pytest.raises(ValueError, match="objective: 'flow' there, 'v' here"):
        train(config(distill=dict(teacher=str(teacher)), model=dict(objective="v")), data, tmp_path / "run")
    with pytest.raises(ValueError, match='width: 8 there, 16 here.*features="none"'):
        train(config(distill=dict(teacher=str(teacher)), model=dict(width=16)), data, tmp_path / "run")
    with pytest.raises(ValueError, match="did you mean 'decoder.3'"):
        config(distill=dict(teacher=str(teacher), stages=["decoder.33"]))
    with pytest.raises(ValueError, match="nothing would be learned"):
        config(distill=dict(teacher=str(teacher), task=0, output=0, features="none"))


def test_a_pruned_network_is_a_start(data, teacher, tmp_path):
    """Its removed_blocks are options of the model, and part of what must agree."""
    state = train(config(start=dict(source=str(teacher)), steps=1), data, tmp_path / "run")
    assert state.model.architecture.removed_blocks == describe(config(), data)[0].removed_blocks != ()
    with pytest.raises(ValueError, match="removed_blocks"):
        train(config(start=dict(source=str(teacher)), model=dict(removed_blocks=None)), data, tmp_path / "other")
