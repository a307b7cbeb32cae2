"""Steps on many devices: simulated ones against real ones of gloo processes, and estimates against simulations."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest

from lamamba import ClusterOptions, SimulateOptions, simulate
from lamamba.benchmarking import scaling
from lamamba.benchmarking.scaling import ScalingModel, padded
from lamamba.benchmarking.simulation import Setup, begin, finish
from tests.training.together import TINY, FewDigits, config, needs_fork_server, together

MODEL = dataclasses.replace(TINY, width=12, objective="noise")
ARCHITECTURE = MODEL.build(channels=1, num_classes=10, input_size=8)
SAME_BACKEND = {"LAMAMBA_BACKEND": "torch"}
"""Of the scan, in both: the GPU operators keep other tensors than PyTorch's formulas."""
WAYS = {
    "FSDP2 of 2": ("fsdp", 2, 2), "FSDP2 of 3": ("fsdp", 3, 3), "HSDP of 4": ("hsdp", 4, 2), "DDP of 2": ("ddp", 2, 1),
    "DDP of 3": ("ddp", 3, 1),
}


def setup(way, **changes):
    kind, world_size, shard_size = WAYS[way]
    return Setup(ARCHITECTURE.to_dict(), kind, world_size, shard_size, (2, 5), **changes)


@functools.cache
def simulated(way, **changes):
    return finish(begin(setup(way, **changes), SAME_BACKEND))


def run(given):
    """The step of a real process group."""
    import os

    import torch
    import torch.distributed as dist

    from lamamba.benchmarking.simulation import measure
    from lamamba.models.unet import LaMambaUNet
    from lamamba.training.distributed import Processes

    os.environ.update(SAME_BACKEND)
    torch.manual_seed(0)
    sharding = {"ddp": {}, "fsdp": dict(sharding="full"), "hsdp": dict(sharding="hybrid", shard_size=given.shard_size)}
    precision = dict(autocast="bfloat16" if given.bfloat16 else "none")
    processes = Processes(config(batch_size=12, precision=precision, processes=sharding[given.kind]))
    model = LaMambaUNet(ARCHITECTURE).train()
    network = processes.distribute(model, [])
    for _ in range(2 if given.kind == "ddp" else 0):                            # its buckets are ordered anew
        network(torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    steps = measure(model, None if network is model else network, given)
    dist.barrier()
    return steps


@needs_fork_server
@pytest.mark.slow
@pytest.mark.parametrize(("way", "changes"), [
    *((way, {}) for way in WAYS), ("FSDP2 of 3", dict(bfloat16=True)), ("HSDP of 4", dict(accumulation_steps=2)),
])
def test_a_simulated_step_is_a_real_one(way, changes):
    """Categories of memory, counts and bytes of collectives."""
    given = setup(way, **changes)
    tolerance = 0.01 if given.bfloat16 else 0.0     # the CPU's kernels keep norms' statistics in other types than fakes
    for last in (False, True):          # gloo's threads hold tensors until they are sent: on a busy machine, too long
        real = together(given.world_size, run, given)[0]
        memory = [pytest.approx(step.memory, rel=tolerance, abs=0) for step in real]
        if last or [step.memory for step in simulated(way, **changes)] == memory:
            break
    for step, measured, expected in zip(simulated(way, **changes), real, memory, strict=True):
        assert step.collectives == measured.collectives
        assert step.bytes == measured.bytes
        assert step.memory == expected


def train_traffic(settings, folder):
    """Collectives of the third step of a training: all until the fourth's, without the callbacks' own."""
    from lamamba.benchmarking.private_distributed import Traffic
    from lamamba.training.loop import train

    seen, traffic = [], Traffic()

    def watch(state):
        seen.append((dict(traffic.counts), dict(traffic.bytes)))

    with traffic:
        train(settings, FewDigits(12), folder, [watch])
    (counts, sizes), (later_counts, later_sizes) = seen[1], seen[2]
    return ({f"{kind} {n}": later_counts[kind, n] - counts.get((kind, n), 0) for kind, n in later_counts},
            {f"{kind} {n}": later_sizes[kind, n] - sizes.get((kind, n), 0) for kind, n in later_sizes})


@needs_fork_server
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_simulated_step_has_the_collectives_of_a_training(tmp_path, way):
    kind, world_size, shard_size = WAYS[way]
    sharding = {"ddp": {}, "fsdp": dict(sharding="full"), "hsdp": dict(sharding="hybrid", shard_size=shard_size)}[kind]
    settings = config(batch_size=12, steps=4, checkpoint_every=4, model=MODEL, processes=sharding)
    counts, sizes = together(world_size, train_traffic, settings, tmp_path / "run")[0]
    step = simulated(way)[0]
    assert {key: number for key, number in counts.items() if number} == step.collectives
    assert {key: number for key, number in sizes.items() if number} == step.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize("autocast", [pytest.param("none", marks=pytest.mark.slow), "bfloat16"])
def test_estimated_traffic_is_that_of_a_simulation(monkeypatch, autocast):
    """Six devices, three in a machine: shards on every dimension, and padded ones."""
    monkeypatch.setattr(scaling, "LARGE_MICRO_BATCH", 4)
    settings = config(batch_size=12, model=MODEL, device="h100", precision=dict(autocast=autocast),
                      processes=dict(accumulation_steps=2))
    model = ScalingModel(settings, ARCHITECTURE, ClusterOptions(node_size=3))
    steps = model.simulate(6)
    assert list(steps) == ["ddp", "fsdp", "hsdp"]
    for kind, step in steps.items():
        estimate = model.estimate(kind, 6)
        gathered, scattered, reduced = (
            sum(size for key, size in step.bytes.items() if key.startswith(name))
            for name in ("all_gather", "reduce_scatter", "all_reduce"))
        assert (gathered, scattered) == (estimate.gathered, estimate.scattered)
        assert 0 < reduced - estimate.reduced < 1000                            # norms and losses
        assert estimate.memory == step.peak + model.averages(kind, 6)


def test_padding_is_what_shards_on_the_first_dimension_need():
    assert padded((4, 42, 640), 64) == 4 * 42 * 640                             # on the last dimension
    assert padded((4, 7), 64) == 64 * 7
    assert padded((5,), 2) == 6


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return simulate(SimulateOptions.from_recipe(
        "digits", world_size=16, device="h200", precision={"autocast": "bfloat16"},
        model={"depths": (1, 1, 1, 1), "bottleneck_depth": 1},
        cluster={"picture": tmp_path_factory.mktemp("picture") / "scaling.png"},
    ))


@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
def test_a_simulation_as_a_call(result):
    assert list(result.steps) == ["ddp", "fsdp", "hsdp"]
    numbers = {each.devices for each in result.estimates}
    assert {1, 2, 16, 1024} <= numbers
    for kind in result.steps:
        assert result.estimate(kind).memory == result.steps[kind].peak
    assert result.steps["fsdp"].memory["weights"] < result.steps["hsdp"].memory["weights"]
    assert result.steps["hsdp"].memory["weights"] < result.steps["ddp"].memory["weights"]
    assert result.communication_wins("fsdp") is not None
    alone = result.estimate("ddp", 1)
    assert (alone.communication, alone.efficiency) == (0, 1)
    hours = result.options.steps * result.options.batch_size / alone.images_per_second / 3600
    assert result.hours("ddp", 1) == pytest.approx(hours)
    assert result.picture.stat().st_size > 10_000
    printed = str(result)
    assert "40% of 989 TFLOP/s (bfloat16)" in printed
    assert "communication takes longer than computation from" in printed


def test_twice_the_speed_takes_half_the_time():
    settings = config(batch_size=12, model=MODEL, device="h100")
    slow, fast = (ScalingModel(settings, ARCHITECTURE, ClusterOptions(tflops=tflops)) for tflops in (100, 200))
    assert slow.operations == fast.operations
    for model in (slow, fast):
        model._peaks["ddp", 1] = 0                                              # as after a simulation
    assert slow.estimate("ddp", 1).seconds == pytest.approx(2 * fast.estimate("ddp", 1).seconds)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="h100"):
        simulate(SimulateOptions.from_recipe("digits", device="h10"))
