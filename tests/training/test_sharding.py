"""Networks split by FSDP2 and HSDP: where their shards lie, their precision, and checkpoints from any kind to any."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import numpy as np
import pytest

from lamamba.options.training import ProcessOptions
from lamamba.training.distributed import shard_size
from lamamba.training.loop import train
from lamamba.utils.distributed import whole
from tests.training.together import TINY, FewDigits, config, pytestmark, together  # noqa: F401

MODEL = dataclasses.replace(TINY, width=12)
"""Three divides its widths, and not the four scan directions: its shards lie on other dimensions than the first."""
KINDS = {
    "one process": (1, {}),
    "DDP": (2, {}),
    "FSDP2": (3, dict(sharding="full")),
    "HSDP": (4, dict(sharding="hybrid", shard_size=2)),
}


def settings(kind, **changes):
    return config(batch_size=4, steps=2, model=MODEL, processes=KINDS[kind][1], **changes)


def states(kind, folders):
    """All tensors of runs that are complete already, gathered, by the run's folder and the tensor's name."""
    tensors = {}
    for folder in folders:
        state = train(settings(kind), FewDigits(6), folder)
        found = {f"ema/{name}": whole(p) for name, p in state.ema.named_parameters()}
        for name, p in state.model.named_parameters():
            found[name] = whole(p)
            found |= {f"{key}/{name}": whole(value) for key, value in state.optimizer.state[p].items()}
        tensors[folder.name] = {name: tensor.detach().numpy() for name, tensor in found.items()}
    return tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of two steps of each kind, and the states that they ended with."""
    folder, ended = tmp_path_factory.mktemp("written"), {}
    for kind, (count, _) in KINDS.items():
        ended |= together(count, states, kind, [folder / kind])[0]
    return folder, ended


@pytest.mark.parametrize("reader", KINDS)
def test_checkpoints_of_every_kind_load_under_any_other_to_the_bit(written, tmp_path, reader):
    folder, ended = written
    for kind in KINDS:
        shutil.copytree(folder / kind, tmp_path / kind)
    for read in together(KINDS[reader][0], states, reader, [tmp_path / kind for kind in KINDS]):
        assert read.keys() == ended.keys()
        for kind, tensors in read.items():
            assert tensors.keys() == ended[kind].keys()
            for name, tensor in tensors.items():
                assert np.array_equal(tensor, ended[kind][name]), (kind, name)


@pytest.mark.parametrize(("writer", "reader"), [("one process", "FSDP2"), ("FSDP2", "one process")])
def test_the_checkpoint_before_the_first_step_loads_under_another_kind(tmp_path, writer, reader):
    """Where a run goes back when the first steps are not finite."""
    settings_of = functools.partial(settings, faults=dict(on_non_finite="back"))
    ended = {}
    for name, kind in (("there", writer), ("here", reader)):
        ended[name] = together(KINDS[kind][0], weights, settings_of(kind), tmp_path / name)[0]
    shutil.rmtree(tmp_path / "there" / "checkpoints" / "step_00000002")
    again = together(KINDS[reader][0], weights, settings_of(reader), tmp_path / "there")[0]
    for name, weight in again.items():
        assert np.array_equal(weight, ended["here"][name]), name


def weights(settings, folder):
    state = train(settings, FewDigits(6), folder)
    return {name: whole(parameter).detach().numpy() for name, parameter in state.model.named_parameters()}


def losses_and_shards(kind, folder, precision):
    """Losses of two steps; and for each parameter its shape, and the shape and dtype of this rank's part."""
    from lamamba.utils.distributed import local

    losses = []
    state = train(settings(kind, precision=precision), FewDigits(6), folder, [lambda now: losses.append(now.loss)])
    parameters = dict(state.model.named_parameters())
    return losses, {name: (tuple(p.shape), tuple(local(p).shape), local(p).dtype) for name, p in parameters.items()}


@pytest.mark.parametrize("kind", ["FSDP2", "HSDP"])
def test_shards_are_even_wherever_a_dimension_divides(tmp_path, kind):
    import torch

    results = together(KINDS[kind][0], losses_and_shards, kind, tmp_path / "run", {})
    ranks = 3 if kind == "FSDP2" else 2
    for _, shards in results:
        assert any(len(shape) == 3 and shape[0] == 4 for shape, _, _ in shards.values())           # W_x and W_dt
        for shape, part, dtype in shards.values():
            assert dtype == torch.float32
            if any(size % ranks == 0 for size in shape):
                assert np.prod(part) * ranks == np.prod(shape)


def test_blocks_gathered_in_bfloat16_learn_what_autocast_learns(tmp_path):
    """To the rounding of the vectors, which autocast leaves in float32."""
    bfloat16 = dict(autocast="bfloat16")
    one, _ = losses_and_shards("one process", tmp_path / "one", bfloat16)
    for kind in ("FSDP2", "HSDP"):
        losses, shards = together(KINDS[kind][0], losses_and_shards, kind, tmp_path / kind, bfloat16)[0]
        np.testing.assert_allclose(losses, one, rtol=1e-3)
        assert {str(dtype) for _, _, dtype in shards.values()} == {"torch.float32"}


@pytest.mark.parametrize(("size", "machine", "world", "expected"), [
    (None, "8", 64, 8), (16, "8", 64, 16), (2, "1", 4, 2), (None, "1", 4, None), (3, "4", 8, None), (8, "8", 8, None),
])
def test_a_hybrid_run_needs_groups_that_fit(monkeypatch, size, machine, world, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", machine)
    options = config(processes=dict(sharding="hybrid", shard_size=size))
    if expected is None:
        with pytest.raises(ValueError, match="at least two such groups"):
            shard_size(options, world)
    else:
        assert shard_size(options, world) == expected


def test_a_shard_size_is_for_hybrid_runs():
    with pytest.raises(ValueError, match="shard_size=2 is for sharding='hybrid'"):
        ProcessOptions(sharding="full", shard_size=2)
