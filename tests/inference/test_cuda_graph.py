"""A recorded pass gives what the network gives; where nothing can be recorded, the network runs as it is."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from lamamba.inference import conditioning, cuda_graph
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.sampling.generate import ImageGenerator, generate
from tests.networks import random_inputs, random_network, relative_error, small_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_with_new_inputs_and_new_weights(dtype):
    model = random_network(small_config(width=32)).to("cuda", dtype)
    recorded = None
    for seed in (1, 2):
        x, t, labels = (part.cuda() for part in random_inputs(model.architecture, batch=3, seed=seed))
        with torch.no_grad():
            rows = model.condition(t, labels)
            recorded = recorded or cuda_graph.RecordedNetwork(model, x.to(dtype), rows)
            assert relative_error(recorded(x.to(dtype), rows), model(x.to(dtype), t, labels)) <= 1e-5
            model.head.linear.weight.mul_(1.5)


@needs_gpu
def test_calls_of_another_thread_do_not_spoil_a_recording():
    model = random_network(small_config(width=32)).cuda()
    x, t, labels = (part.cuda() for part in random_inputs(model.architecture, batch=3))
    ends = threading.Event()

    def call() -> None:
        while not ends.is_set():
            torch.empty(2**26, device="cuda")
            torch.cuda.synchronize()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        with torch.no_grad():
            rows = model.condition(t, labels)
            assert relative_error(cuda_graph.RecordedNetwork(model, x, rows)(x, rows), model(x, t, labels)) <= 1e-5
    finally:
        ends.set()
        thread.join()


@needs_gpu
def test_sampling_on_a_gpu_records_small_batches():
    model = random_network(small_config()).cuda()
    x, _, labels = (part.cuda() for part in random_inputs(model.architecture))
    network = ConditionedNetwork(model, [900.0, 100.0], labels.tolist())
    with torch.no_grad():
        for time in (900.0, 100.0):
            t = torch.full((2,), time)
            assert relative_error(network(x, t, labels), model(x, t, labels)) <= 1e-5
    assert network._recorded is not None


@needs_gpu
def test_a_recording_is_replayed_after_the_grid_was_changed_and_set_again():
    model = random_network(small_config(in_channels=1, objective="flow", width=16)).cuda()
    generator = ImageGenerator(model, num_steps=3, guidance=2.0, input_size=(8, 16), labels=range(3))
    first = generator([0, 1, 2], [0, 1, 2])
    other = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, input_size=(16, 16))         # takes what memory is free
    np.testing.assert_array_equal(generator([0, 1, 2], [0, 1, 2]), first)
    assert other.shape == (3, 16, 16, 1)


def test_a_pass_that_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    model = random_network(small_config())
    x, _, labels = random_inputs(model.architecture)
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(conditioning, "is_small", lambda x, model: True)
    monkeypatch.setattr(cuda_graph, "RecordedNetwork", refuse)
    network = ConditionedNetwork(model, [900.0, 100.0], labels.tolist())
    with torch.no_grad():
        for time in (900.0, 100.0):
            t = torch.full((2,), time)
            torch.testing.assert_close(network(x, t, labels), model(x, t, labels))
    assert len(tried) == 1                                                      # and not again at every step
    assert "cannot be recorded as a CUDA graph" in caplog.text
