"""One run on one, two and four processes: the same images, and to rounding the same losses. Real gloo groups."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from lamamba.runs.model import open_network
from lamamba.training.loop import train
from lamamba.utils.distributed import part
from lamamba.utils.errors import RankZeroError
from tests.training.together import FewDigits, config, pytestmark, read_lines, states_equal, together  # noqa: F401


def run(settings, folder, images=7):
    """Train; what was seen, lost and learned, as plain values."""
    from torch.distributed.tensor import DTensor

    digits, losses, norms, whole = FewDigits(images), [], [], []

    def watch(step_state):
        losses.append(step_state.loss)
        norms.append(step_state.grad_norm)
        if step_state.step == step_state.steps:
            whole.append(step_state.whole_ema())

    state = train(settings, digits, folder, [watch])
    kinds = {isinstance(p, DTensor) for p in (*state.model.parameters(), *state.ema.parameters())}
    kinds |= {isinstance(moments["exp_avg"], DTensor) for moments in state.optimizer.state.values()}
    ema = [p.numpy() for p in whole[0].parameters()] if whole and whole[0] is not None else None
    return {"seen": digits.seen, "losses": losses, "norms": norms, "split": kinds, "ema": ema, "step": state.step}


def assert_close(results, alone, rtol):
    """Every process has the losses of one process alone, and rank 0 its average: to rounding, which AdamW enlarges."""
    for result in results:
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=rtol)
    for p, q in zip(results[0]["ema"], alone["ema"], strict=True):
        np.testing.assert_allclose(p, q, atol=1e-3)


def assert_two_processes_make_the_same_run(settings, sharding, folder):
    alone = run(settings, folder / "alone")
    split = dataclasses.replace(settings, processes=dataclasses.replace(settings.processes, sharding=sharding))
    assert_close(together(2, run, split, folder / "run"), alone, 2e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Six steps of six of seven images, in one process: (folder, result)."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, run(config(batch_size=6, steps=6, checkpoint_every=3, keep_checkpoints=5), folder)


def assert_same_run(results, alone, steps=6):
    one, count = alone[1], len(results)
    for step in range(steps):                                                   # process by process, as one would see
        shares = [part(range(6), index, count) for index in range(count)]
        starts = [step * len(share) for share in shares]
        seen = [
            index for result, share, begin in zip(results, shares, starts, strict=True)
            for index in result["seen"][begin : begin + len(share)]
        ]
        assert seen == one["seen"][step * 6 : (step + 1) * 6]
    assert_close(results, one, 2e-5)
    for result in results:
        np.testing.assert_allclose(result["norms"], one["norms"], rtol=1e-3)
        assert result["step"] == steps
    assert all(result["ema"] is None for result in results[1:])                 # rank 0 alone has the whole network


@pytest.mark.parametrize(("count", "pieces"), [(1, 3), (2, 1), (4, 1), (2, 3)])
def test_any_number_of_processes_and_pieces_gives_the_same_run(alone, tmp_path, count, pieces):
    """With four processes the shares differ: 2, 2, 1 and 1 images."""
    settings = config(batch_size=6, steps=6, checkpoint_every=3, processes=dict(accumulation_steps=pieces))
    assert_same_run(together(count, run, settings, tmp_path / "run"), alone)
    for one, other in zip(read_lines(tmp_path / "run"), read_lines(alone[0]), strict=True):
        assert (one["step"], one["loss"]) == (other["step"], pytest.approx(other["loss"], rel=2e-5))


SPLIT = dict(sharding="full")


def test_a_split_network_trains_saves_resumes_and_loads_in_one_process(alone, tmp_path):
    settings = config(batch_size=6, steps=6, checkpoint_every=3, keep_checkpoints=5)
    pieces = dict(**SPLIT, accumulation_steps=2)
    split = config(batch_size=6, steps=6, checkpoint_every=3, keep_checkpoints=5, processes=pieces)
    results = together(2, run, split, tmp_path / "run")
    assert [result["split"] for result in results] == [{True}, {True}]          # all parameters, averages and moments
    assert_same_run(results, alone)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert len(list((checkpoint / "shards").glob("*.safetensors"))) == 2
    assert not list((tmp_path / "run").rglob("*.metadata"))                     # nothing pickled
    model, _ = open_network(checkpoint)
    assert model.architecture.width == 8

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    resumed = together(2, run, split, tmp_path / "run")
    assert [result["split"] for result in resumed] == [{True}, {True}]
    assert resumed[0]["losses"] == results[0]["losses"][3:]                     # to the bit
    for p, q in zip(resumed[0]["ema"], results[0]["ema"], strict=True):
        assert np.array_equal(p, q)
    one = run(settings, tmp_path / "alone")                                     # and from two processes to one
    np.testing.assert_allclose(one["losses"], results[0]["losses"][3:], rtol=2e-5)
    assert one["seen"] == alone[1]["seen"][18:]


def test_parts_are_neighbours_that_differ_by_one_at_most():
    for size in range(1, 20):
        for count in range(1, size + 1):
            parts = [part(range(5, 5 + size), index, count) for index in range(count)]
            assert [item for items in parts for item in items] == list(range(5, 5 + size))
            assert {len(items) for items in parts} <= {size // count, size // count + 1}


def test_what_does_not_fit_is_refused_everywhere(tmp_path):
    answers = together(2, run, config(batch_size=3, processes=dict(accumulation_steps=2)), tmp_path / "small")
    assert [answer.args[0] for answer in answers] == [ValueError, ValueError]
    assert "batch_size=3 cannot be cut into 2 processes x 2" in answers[0].args[1]
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        train(config(processes=SPLIT), FewDigits(4), tmp_path / "alone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    first, second = together(2, run, config(), tmp_path / "full")
    assert (first.args[0], second.args[0]) == (FileExistsError, RankZeroError)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_accelerate_s_own_fsdp_is_refused_with_the_way_to_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="processes.sharding='full'"):
        train(config(), FewDigits(4), tmp_path)


def test_accumulation_in_one_process_resumes_to_the_bit(tmp_path):
    settings = config(batch_size=5, processes=dict(accumulation_steps=2))
    whole = train(settings, FewDigits(7), tmp_path / "whole")
    train(config(batch_size=5, steps=2, processes=dict(accumulation_steps=2)), FewDigits(7), tmp_path / "parts")
    assert states_equal(whole, train(settings, FewDigits(7), tmp_path / "parts"))
