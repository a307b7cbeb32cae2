"""NaN in a loss, Inf in a gradient, on one of two ranks: no rank updates, and samples and module are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.models.resample import PatchMerging
from lamamba.runs.folder import RunFolder
from lamamba.runs.model import open_network
from lamamba.training.loop import train
from tests.training.together import Failed, FewDigits, config, pytestmark, states_equal, together  # noqa: F401

BAD = 5
"""Index of the image that is not finite. Batches of 4 of 9 images: at some steps, one rank of two has it."""


class WithNaN(FewDigits):
    """One image is NaN."""

    def read(self, indices):
        images, labels = super().read(indices)
        images = images.astype(np.float32)
        images[np.asarray(indices) == BAD] = np.nan
        return images, labels


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, is_bad):
        ctx.is_bad = is_bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf") if ctx.is_bad else gradient, None


def add_infinite_gradient(digits, settings):
    """The image's loss stays finite; in the backward pass of the second patch merging its gradient does not."""
    merge, read = PatchMerging.forward, digits.read
    state = {"bad": False}

    def forward(self, x):
        is_bad = state["bad"] and x.shape[-1] == 2 * settings.model.width
        return merge(self, _InfiniteGradient.apply(x, is_bad))

    def read_and_mark(indices):
        state["bad"] = BAD in list(indices)
        return read(indices)

    PatchMerging.forward, digits.read = forward, read_and_mark


def run(settings, folder, kind):
    """(steps done, batches omitted, faults, weights are finite, losses, what was seen)."""
    digits = WithNaN(9) if kind == "loss" else FewDigits(9)
    if kind == "gradient":
        add_infinite_gradient(digits, settings)
    losses, weights = [], []

    def watch(step_state):
        losses.append(step_state.loss)
        whole = step_state.whole_ema()
        weights.append(None if whole is None else [p.detach().clone() for p in whole.parameters()])

    try:
        state = train(settings, digits, folder, [watch])
    except FloatingPointError as error:
        model, _ = open_network(folder) if RunFolder(folder).names() else (None, None)
        can_compare = model is not None and weights[-1] is not None
        untouched = all(map(torch.equal, weights[-1], model.parameters())) if can_compare else None
        return {"error": str(error), "losses": losses, "untouched": untouched, "seen": digits.seen}
    finite = all(p.isfinite().all() for p in (*state.model.parameters(), *state.ema.parameters()))
    return {"step": state.step, "omitted": state.omitted, "faults": state.faults, "finite": finite,
            "losses": losses, "seen": digits.seen}


BEGAN = {
    "loss": "forward pass of patch_embedding",
    "gradient": r"backward pass of merges.1 (PatchMerging): made from finite gradients",
}


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_before_any_process_updates_and_name_files_and_module(tmp_path, kind, sharding, tally):
    settings = config(steps=20, checkpoint_every=1, processes=dict(sharding=sharding))
    first, second = together(2, run, settings, tmp_path / "run", kind)
    assert "error" in first, first
    assert first["error"] == second["error"]
    assert first["losses"] == second["losses"]
    assert all(map(np.isfinite, first["losses"]))
    assert "weights were not touched" in first["error"]
    assert f"digit-{BAD}.png" in first["error"]
    assert BEGAN[kind] in first["error"]
    last = [index for result in (first, second) for index in result["seen"][-2:]]
    assert BAD in last
    where = 0 if BAD in first["seen"][-2:] else 1
    assert f"rank {where}: " in first["error"]
    assert f"rank {1 - where}: " not in first["error"]
    assert f"step {len(first['losses']) + 1}: loss {'nan' if kind == 'loss' else ''}" in first["error"]
    assert first["untouched"] in ((True,) if first["losses"] else (None,))      # rank 0 has the whole network
    newest = RunFolder(tmp_path / "run").names()[-1] if first["losses"] else "none yet"
    assert f"Last checkpoint: {newest}" in first["error"]
    tally(f"6 {kind} not finite on one of two processes: stop", 1, 1)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(("policy", "every", "sharding"), [
    ("skip", 1, "none"), ("back", 2, "none"), ("back", 2, "full"),
])
def test_skip_and_back_go_on_with_other_batches(tmp_path, kind, policy, every, sharding, count, tally):
    settings = config(
        steps=8, checkpoint_every=every, faults=dict(on_non_finite=policy, max_skips=20),
        processes=dict(sharding=sharding),
    )
    first, second = together(2, run, settings, tmp_path / "run", kind)
    assert not isinstance(first, Failed), first.args
    for result in (first, second):
        assert (result["step"], result["finite"]) == (8, True)
        assert result["faults"] >= 2
        assert result["omitted"] >= result["faults"]
    assert first["losses"] == second["losses"]
    if count(False, True):                                                      # and it can be repeated
        assert together(2, run, settings, tmp_path / "again", kind)[0]["losses"] == first["losses"]
    seen = sum(len(result["seen"]) for result in (first, second))
    assert seen == 4 * (8 + first["omitted"])                                   # every batch was read once
    if policy == "back":
        assert first["omitted"] > first["faults"]                               # whole stretches, not single batches
    tally(f"6 {kind} not finite on one of two processes: {policy}", first["faults"], second["faults"])


def test_back_at_the_start_the_optimizer_begins_anew(tmp_path):
    settings = config(batch_size=1, steps=7, checkpoint_every=50, faults=dict(on_non_finite="back"))
    state = train(settings, WithNaN(9), tmp_path / "run")
    assert (state.faults, state.omitted) == (1, 6)                              # five steps were undone
    assert {float(moments["step"]) for moments in state.optimizer.state.values()} == {7}


def test_more_faults_than_allowed_stop_the_run(tmp_path, tally):
    settings = config(steps=50, checkpoint_every=1, faults=dict(on_non_finite="skip", max_skips=1))
    with pytest.raises(FloatingPointError, match="There were 1 before it, and faults.max_skips=1"):
        train(settings, WithNaN(9), tmp_path / "run")
    tally("6 more faults than allowed", 1, 1)


def test_a_skip_survives_a_restart_to_the_bit(tmp_path, tally):
    options = dict(checkpoint_every=2, faults=dict(on_non_finite="skip", max_skips=20))
    whole = train(config(steps=8, **options), WithNaN(9), tmp_path / "whole")
    train(config(steps=4, **options), WithNaN(9), tmp_path / "parts")
    parts = train(config(steps=8, **options), WithNaN(9), tmp_path / "parts")
    assert whole.omitted == whole.faults > 0
    tally("6 restart after a skip", 1, int(states_equal(whole, parts)))


def test_a_weight_that_is_not_finite_is_named():
    from lamamba.training.non_finite import find_origin
    from tests.networks import random_inputs, random_network, small_config

    model = random_network(small_config())
    with torch.no_grad():
        model.encoder[1].blocks["0"].branches["mlp"].linear_in.weight[0, 0] = float("nan")
    x, t, y = random_inputs(model.architecture)
    origin, rows = find_origin(model, lambda: model(x, t, y).flatten(1).mean(1))
    assert origin.startswith("forward pass of encoder.1.blocks.0.branches.mlp.linear_in (Linear), whose weight is not")
    assert rows == [0, 1]
