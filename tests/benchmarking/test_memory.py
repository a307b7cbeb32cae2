"""The estimate of a training step's memory is within 15 % of what a process takes, for two sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lamamba import UNetConfig
from lamamba.benchmarking.memory import training_memory

MEASURE = """
import json, sys, torch
from lamamba import LaMambaUNet, UNetConfig
from lamamba.training.checkpoint import averages_of, update_ema

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def step(config, batch, optimizer, model, average):
    x, t = torch.randn(batch, 4, *config.input_size), torch.randint(0, 1000, (batch,))
    optimizer.zero_grad(set_to_none=True)
    model(x, t, torch.zeros(batch, dtype=torch.int64)).square().mean().backward()
    optimizer.step()
    update_ema(average, model, 0.999)

def parts(config, checkpoint):
    model = LaMambaUNet(config).train()
    if checkpoint:
        model.enable_gradient_checkpointing()
    return torch.optim.AdamW(model.parameters(), fused=True), model, averages_of(model, (0.999,))[0.999]

torch.set_num_threads(1)
preset, image_size, batch, checkpoint = json.loads(sys.argv[1])
tiny = UNetConfig(width=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1, grid=8, num_classes=1)
step(tiny, 1, *parts(tiny, checkpoint))                                         # libraries are loaded
before = status("VmRSS")
config = UNetConfig.preset(preset, image_size=image_size)
made = parts(config, checkpoint)
for _ in range(2):
    step(config, batch, *made)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("preset", "image_size", "batch", "checkpoint"), [
    ("s", 256, 4, False), ("b", 128, 8, False), ("b", 128, 8, True),
])
def test_the_estimate_is_within_fifteen_percent(preset, image_size, batch, checkpoint):
    """Freed memory goes back to the system at once here, so that what is measured is what tensors took."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([preset, image_size, batch, checkpoint])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, check=True, env=environment
    )
    config = UNetConfig.preset(preset, image_size=image_size)
    estimate = training_memory(config, batch, checkpoint_activations=checkpoint)
    assert estimate.peak == pytest.approx(int(done.stdout), rel=0.15)
    print(f"{preset} {image_size} px, batch {batch}: {estimate.peak:,} bytes estimated, {int(done.stdout):,} taken")


@pytest.mark.slow
def test_options_move_the_estimate_as_they_move_memory():
    config = UNetConfig.preset("s", image_size=256)
    plain = training_memory(config, 8)
    assert training_memory(config, 8, checkpoint_activations=True).peak < 0.7 * plain.peak
    assert training_memory(config, 8, bfloat16=True).peak < plain.peak
    assert training_memory(config, 8, num_averages=3).state == plain.state * 6 // 4
    split = training_memory(config, 8, processes=4, sharded=True)
    assert split.state == plain.state // 4
    assert training_memory(config, 16).step > 1.7 * plain.step
